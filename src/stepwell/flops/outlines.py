"""Tensors that are shapes alone, fast: torch's meta device without the ops of it that are slow.

Several ops on the meta device are Python programs, and the first of them imports the whole compiler. Here the
shape of their result is written down; what is not in the table is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # True, torch's default, imports the compiler to be skipped by it
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outline = _OUTLINES.get(func._overloadpacket)
        if outline is None or not all(x.is_meta for x in args if isinstance(x, Tensor)):
            return func(*args, **(kwargs or {}))
        return outline(*args, **(kwargs or {}))


def _pointwise(*args: Any, **options: Any) -> Tensor:
    operands: list[Any] = [x for x in args if isinstance(x, Tensor | int | float)]
    first, *tensors = (x for x in operands if isinstance(x, Tensor))
    shapes = {first.shape, *(x.shape for x in tensors)}
    shape = first.shape if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
    return first.new_empty(shape, dtype=torch.result_type(*operands[:2]) if operands[1:] else first.dtype)


def _reduced(x: Tensor, dims: Sequence[int], keep: bool = False, **options: Any) -> Tensor:
    reduced = {dim % x.dim() for dim in dims}
    return x.new_empty([1 if i in reduced else n for i, n in enumerate(x.shape) if keep or i not in reduced])


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return tensors[0].new_empty(shape)


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _joined([x.unsqueeze(dim) for x in tensors], dim)


def _normed(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)  # what the gradient needs is left out


def _resized(x: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *size)


_aten = torch.ops.aten
_POINTWISE = (
    *(_aten.abs, _aten.add, _aten.addcmul, _aten.clamp, _aten.clone, _aten.cos, _aten.floor),
    *(_aten.gelu, _aten.mul, _aten.nan_to_num, _aten.pow, _aten.relu, _aten.rsqrt, _aten.rsub, _aten.sigmoid),
    *(_aten.sin, _aten.sub, _aten._safe_softmax, _aten._softmax),
)
_IN_PLACE = (
    *(_aten.add_, _aten.copy_, _aten.fill_, _aten.gelu_, _aten.mul_, _aten.normal_, _aten.sigmoid_),
    *(_aten.uniform_, _aten.zero_),
)
_OUTLINES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_IN_PLACE, lambda x, *others, **options: x),
    **dict.fromkeys((_aten.amax, _aten.mean, _aten.sum), _reduced),
    **dict.fromkeys((_aten.native_group_norm, _aten.native_layer_norm), _normed),
    **dict.fromkeys((_aten.upsample_bicubic2d, _aten.upsample_bilinear2d), _resized),
    _aten.addmm: lambda bias, a, b, **scale: a.new_empty(a.shape[0], b.shape[1]),
    _aten.cat: _joined,
    _aten.div: lambda x, y, **mode: _pointwise(_pointwise(x, y), 1 if mode else 1.0),  # integers: to floats
    _aten.grid_sampler_2d: lambda x, grid, *options: x.new_empty(*x.shape[:2], *grid.shape[1:3]),
    _aten.stack: _stacked,
}
