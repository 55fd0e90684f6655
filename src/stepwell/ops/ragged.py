"""A network over tensors of unequal shape: those that are alike go through together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["by_shape"]


def by_shape(
    run: Callable[[Tensor], Sequence[Tensor]], tensors: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """run: (B, *shape) -> several (B, ...). Its outputs for every tensor (*shape), in the tensors' order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tuple(tensor.shape), []).append(i)
    outputs: dict[int, tuple[Tensor, ...]] = {}
    for members in groups.values():
        alone = len(members) == 1
        batch = tensors[members[0]][None] if alone else torch.cat([tensors[i][None] for i in members])
        outputs.update(zip(members, zip(*run(batch), strict=True), strict=True))
    return [outputs[i] for i in range(len(tensors))]
