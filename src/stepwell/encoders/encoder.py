"""The Encoder protocol: a stem, layers that can be run a few at a time, and the way back to a map.

Branches of a pyramid meet in between layers (PIIP, arXiv 2501.07783, section III-B), so an encoder here is
not a closed function: `stem`, then `run` over closed ranges of layers, then `to_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepwell.ops.choose import prefer, preferred
from stepwell.structures import EncoderSpec, TokenMap

__all__ = ["Encoder", "run_layers", "same_path", "side_by_side", "with_grid"]


@runtime_checkable
class Encoder(Protocol):
    spec: EncoderSpec

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, H, W) normalised -> tokens after patch or stem embedding, with their position embedding."""
        ...

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Layers first..last, both included; an empty range (last < first) returns `state` unchanged."""
        ...

    def to_map(self, state: TokenMap) -> Tensor:
        """-> (B, C, H, W) of the patch tokens, without the class token."""
        ...


def run_layers(
    layers: nn.ModuleList | Sequence[Callable[..., Tensor]],
    x: Tensor,
    first: int,
    last: int,
    *arguments: Any,
    checkpointing: bool,
) -> Tensor:
    """x through layers first..last, both included; `arguments` go to each of them beside x.

    checkpointing: recompute them in the backward pass. Raises ValueError for layers that do not exist.
    """
    if first < 0 or last >= len(layers):
        raise ValueError(f"layers {first}..{last} asked of a network with layers 0..{len(layers) - 1}")
    for i in range(first, last + 1):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(layers[i], x, *arguments, use_reentrant=False, context_fn=same_path)
        else:
            x = layers[i](x, *arguments)
    return x


def side_by_side(state: TokenMap) -> Tensor:
    """(B, [1 +] [R +] H*W, C): class token, registers and patches in one sequence, as blocks take them."""
    in_front = [token for token in (state.class_token, state.registers) if token is not None]
    return torch.cat([*in_front, state.tokens], dim=1) if in_front else state.tokens


def with_grid(tokens: Tensor, like: TokenMap) -> TokenMap:
    """The inverse: a sequence taken apart as `like` is."""
    lengths = [0 if token is None else token.shape[1] for token in (like.class_token, like.registers)]
    if not any(lengths):
        return like._replace(tokens=tokens)
    class_token, registers, patches = tokens.split([*lengths, tokens.shape[1] - sum(lengths)], dim=1)
    return TokenMap(
        patches,
        like.size,
        None if like.class_token is None else class_token,
        None if like.registers is None else registers,
    )


def same_path() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass and for its repetition, which on a GPU runs in a thread of the backward pass."""
    return nullcontext(), prefer(preferred())
