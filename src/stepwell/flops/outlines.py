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
        if outline is None or not all(x.is_meta for x in _tensors(args)):
            return func(*args, **(kwargs or {}))
        return outline(*args, **(kwargs or {}))


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """Those among the arguments of an op, and in their lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (x for x in arg if isinstance(x, Tensor))


def _pointwise(*args: Any, **options: Any) -> Tensor:
    operands: list[Any] = [x for x in args if isinstance(x, Tensor | int | float)]
    shaped, *others = [x for x in operands if isinstance(x, Tensor)]
    if any(x.shape != shaped.shape for x in others):
        shaped = torch.broadcast_tensors(shaped, *others)[0]  # torch.broadcast_shapes would import sympy
    dtype = torch.result_type(*operands[:2]) if operands[1:] else shaped.dtype
    return shaped.new_empty(shaped.shape, dtype=dtype)


def _reduced(x: Tensor, dims: Sequence[int] | None = None, keep: bool = False, **options: Any) -> Tensor:
    reduced = {dim % x.dim() for dim in dims or range(x.dim())}
    return x.new_empty([1 if i in reduced else n for i, n in enumerate(x.shape) if keep or i not in reduced])


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return tensors[0].new_empty(shape)


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _convolved(x: Tensor, weight: Tensor, bias: Any, *geometry: Any) -> Tensor:
    strides, paddings, dilations, transposed, added, groups = geometry
    axes = zip(x.shape[2:], weight.shape[2:], strides, paddings, dilations, added, strict=True)
    if transposed:
        sides = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + a for n, k, s, p, d, a in axes]
        return x.new_empty(len(x), weight.shape[1] * groups, *sides)
    return x.new_empty(
        len(x), len(weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes)
    )


def _repeated(x: Tensor, times: Sequence[int]) -> Tensor:
    shape = (*[1] * (len(times) - x.dim()), *x.shape)
    return x.new_empty([n * count for n, count in zip(shape, times, strict=True)])


def _resized(x: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *size)


def _padded(x: Tensor, pads: Sequence[int]) -> Tensor:
    left, right, top, bottom = pads
    return x.new_empty(*x.shape[:-2], x.shape[-2] + top + bottom, x.shape[-1] + left + right)


def _pooled(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    axes = zip(x.shape[2:], kernel, strides, pads, strict=True)
    sides = [(n + 2 * p - k) // s + 1 for n, k, s, p in axes]
    return x.new_empty(*x.shape[:2], *sides), x.new_empty(0)


def _alone(outline: Tensor) -> tuple[Tensor, ...]:
    """With nothing for what only a gradient needs."""
    return outline, *(outline.new_empty(0) for _ in range(3))


_aten = torch.ops.aten
_POINTWISE = (
    *(_aten.abs, _aten.add, _aten.clamp, _aten.clone, _aten.cos, _aten.exp, _aten.floor, _aten.gelu),
    *(_aten.mul, _aten.nan_to_num, _aten.neg, _aten.pow, _aten.relu, _aten.rsqrt, _aten.rsub, _aten.sigmoid),
    *(_aten.sin, _aten.sub, _aten._safe_softmax, _aten._softmax),
)
_IN_PLACE = (
    *(_aten.add_, _aten.addcmul_, _aten.copy_, _aten.fill_, _aten.normal_),
    *(_aten.uniform_, _aten.zero_),
)
_OUTLINES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_IN_PLACE, lambda x, *others, **options: x),
    **dict.fromkeys((_aten.amax, _aten.mean, _aten.sum), _reduced),
    **dict.fromkeys((_aten.bmm, _aten.mm), _multiplied),
    **dict.fromkeys(
        (_aten._adaptive_avg_pool2d, _aten.upsample_bicubic2d, _aten.upsample_bilinear2d), _resized
    ),
    _aten._embedding_bag_forward_only: lambda x, i, bags, *options: _alone(
        x.new_empty(len(bags), x.shape[1])
    ),
    _aten.addmm: lambda bias, a, b, **scale: _multiplied(a, b),
    _aten.cat: _joined,
    _aten.convolution: _convolved,
    _aten.div: lambda x, y, **mode: _pointwise(_pointwise(x, y), 1 if mode else 1.0),  # integers: to floats
    _aten.grid_sampler_2d: lambda x, grid, *options: x.new_empty(*x.shape[:2], *grid.shape[1:3]),
    _aten.max_pool2d_with_indices: _pooled,
    _aten.native_group_norm: lambda x, *options: _alone(x.new_empty(x.shape))[:3],
    _aten.native_layer_norm: lambda x, *options: _alone(x.new_empty(x.shape))[:3],
    _aten.reflection_pad2d: _padded,
    _aten.repeat: _repeated,
    _aten.stack: lambda tensors, dim=0: _joined([x.unsqueeze(dim) for x in tensors], dim),
}
