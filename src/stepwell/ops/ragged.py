"""A network over tensors of unequal shape: those that are alike go through together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["by_shape", "by_shapes"]


def by_shape(
    run: Callable[[Tensor], Sequence[Tensor]], tensors: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """run: (B, *shape) -> several (B, ...). Its outputs for every tensor (*shape), in the tensors' order."""
    return by_shapes(run, [(tensor,) for tensor in tensors])


def by_shapes(
    run: Callable[..., Sequence[Tensor]], items: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """run: as many tensors (B, *shape) as an item has -> several (B, ...). Its outputs for every item, in
    their order.
    """
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(tuple(tensor.shape for tensor in item), []).append(i)
    outputs: dict[int, tuple[Tensor, ...]] = {}
    for members in groups.values():
        batches = [_batch(tensors) for tensors in zip(*(items[i] for i in members), strict=True)]
        outputs.update(zip(members, zip(*run(*batches), strict=True), strict=True))
    return [outputs[i] for i in range(len(items))]


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.cat([tensor[None] for tensor in tensors])
