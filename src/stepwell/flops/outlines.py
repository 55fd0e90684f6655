"""Tensors that are shapes alone, fast: torch's meta device without the ops of it that are slow.

Several ops on the meta device are Python programs, and the first of them imports the whole compiler. Here the
shape of their result is written down; what is not in the table is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Outlines", "outlines"]


@contextmanager
def outlines() -> Iterator[None]:
    """What is built in the block has shapes and no memory."""
    with torch.device("meta"), Outlines():
        yield


class Outlines(TorchDispatchMode):
    """Answers the ops of the table by an empty tensor of the right shape, where all that goes in is meta."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _OUTLINES and all(arg.is_meta for arg in args if isinstance(arg, Tensor)):
            return _OUTLINES[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _broadcast(a: Tensor, b: Tensor | float, *rest: Tensor, **scale: Any) -> Tensor:
    tensors = [x for x in (a, b, *rest) if isinstance(x, Tensor)]
    dtype = torch.result_type(a, b)
    for x in rest:
        dtype = torch.promote_types(dtype, x.dtype)
    return a.new_empty(torch.broadcast_shapes(*(x.shape for x in tensors)), dtype=dtype)


def _normed(x: Tensor, normed: list[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape[: x.dim() - len(normed)])
    return x.new_empty(x.shape), rows, rows


def _alike(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _itself(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x


_aten = torch.ops.aten
_OUTLINES: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: _broadcast,
    _aten.addcmul.default: _broadcast,
    _aten.addmm.default: lambda bias, a, b, **scale: a.new_empty(a.shape[0], b.shape[1]),
    _aten.gelu.default: _alike,
    _aten.gelu_.default: _itself,
    _aten.grid_sampler_2d.default: lambda x, grid, *rest: x.new_empty(*x.shape[:2], *grid.shape[1:3]),
    _aten.mul.Tensor: _broadcast,
    _aten.native_layer_norm.default: _normed,
    _aten.normal_.default: _itself,
    _aten.sub.Tensor: _broadcast,
    _aten.uniform_.default: _itself,
}
