"""Deformable attention: every query reads its own few points of one map or several, and sums them by weight.

Deformable DETR, arXiv 2010.04159, equation 3; the branches of PIIP (arXiv 2501.07783) talk through it, of one
level each, and DINO reads four. Points are read bilinearly, and outside a map there is zero. A place that is
no finite number gives NaN.
Letters: B batch, M heads, D width of a head, Nq queries, L levels, P points of a level, (H, W) the grid of a
level; x and y the column and row of a point, counted in cells of its level from the centre of the first.

The fast twin sees that a query's output is a weighted sum of 4*L*P rows of a table, which is `embedding_bag`;
and that a row's gradient is the same sum with rows and queries in exchanged roles. It works on flat (B, Nq,
M*P) planes: axes of four points or two coordinates are too short for vectorised loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import choose
from stepwell.ops.derivatives import with_derivatives_of
from stepwell.ops.parts import in_parts
from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = ["deform_attn", "deform_attn_fast", "deform_attn_reference"]


def deform_attn(value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """value (B, N, M, D): the cells of a grid for every entry of `sizes`, level after level; x, y and weights
    (B, Nq, M, L*P): the points of every level, as many of each, in the same order; x and y in cells
    -> (B, Nq, M*D) in the dtype of `value`, heads side by side."""
    _check(value, sizes, weights)
    fast = choose(
        fast_ok=value.device.type in ("cpu", "meta"),
        why_not=f"deformable attention has a fast twin on CPU only, not on {value.device.type}",
    )
    exact = at_least_single(value.dtype)  # half precision would miss points by whole cells
    run = deform_attn_fast if fast else deform_attn_reference
    return run(value.to(exact), sizes, x.to(exact), y.to(exact), weights.to(exact)).to(value.dtype)


def _check(value: Tensor, sizes: Sequence[Size], weights: Tensor) -> None:
    if value.shape[1] != sum(height * width for height, width in sizes):
        grids = " and ".join(f"{height}x{width}" for height, width in sizes)
        kind = "a grid" if len(sizes) == 1 else "grids"
        raise ValueError(f"value has {value.shape[1]} tokens, but {kind} of {grids} cells")
    if weights.shape[-1] % len(sizes):
        raise ValueError(f"{weights.shape[-1]} points of a head do not divide among {len(sizes)} levels")


def deform_attn_reference(
    value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor
) -> Tensor:
    """As `deform_attn`, all tensors of one dtype."""
    values = value.split([height * width for height, width in sizes], dim=1)
    levels = zip(values, sizes, *(points.chunk(len(sizes), -1) for points in (x, y, weights)), strict=True)
    return reduce(torch.add, [_sample(*level) for level in levels])


def _sample(value: Tensor, size: Size, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """`deform_attn_reference` of one level."""
    maps = value.permute(0, 2, 3, 1).unflatten(3, size).flatten(0, 1)  # (B*M, D, H, W)
    grid = torch.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], -1)  # -1 and 1 are the edges
    grid = grid.transpose(1, 2).flatten(0, 1)  # (B*M, Nq, P, 2)
    points = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = weights + 0 * (x + y)  # NaN where a place is none: on GPUs grid_sample reads zeros there
    heads = (points * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B*M, D, Nq)
    out: Tensor = heads.unflatten(0, (value.shape[0], value.shape[2]))
    return out.permute(0, 3, 1, 2).flatten(2)


def deform_attn_fast(value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """As `deform_attn`, all tensors of one dtype."""
    out = in_parts(lambda *queries: _read(value, sizes, *queries), x, y, weights)
    return with_derivatives_of(
        lambda value, *queries: deform_attn_reference(value, sizes, *queries), (value, x, y, weights), out
    )


def _read(value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    (batch, cells, heads, dim), (_, queries, _, points) = value.shape, weights.shape
    small = max(batch * cells * heads, 4 * weights.numel()) < 2**31
    integer = torch.int32 if small else torch.int64  # half the memory to read, and a faster sort
    height, width, level_start = _of_planes(sizes, heads, points, integer, value.device)
    head = torch.arange(heads, dtype=integer, device=value.device).repeat_interleave(points)
    image = torch.arange(batch, dtype=integer, device=value.device).view(-1, 1, 1) * (cells * heads)
    first = image + (level_start * heads + head)

    weights = weights.flatten(2)
    columns = [(cell * heads, near) for cell, near in _neighbours(x.flatten(2), width, integer)]
    lines = [
        (cell * (width * heads) + first, near * weights)
        for cell, near in _neighbours(y.flatten(2), height, integer)
    ]
    index = torch.stack([line + column for line, _ in lines for column, _ in columns], -1)
    corners = torch.stack([above * beside for _, above in lines for _, beside in columns], -1)

    bags = (batch * queries * heads, 4 * points)
    out = _sum_rows(value.flatten(0, 2), index.view(bags), corners.view(bags))
    return out.view(batch, queries, heads * dim)


Length = int | Tensor
"""One number, or whole ones (M*L*P,) for a plane each."""


def _of_planes(
    sizes: Sequence[Size], heads: int, points: int, integer: torch.dtype, device: torch.device
) -> tuple[Length, Length, Length]:
    """Height, width and first cell of the level that a point is on; plain numbers for one level, which are
    quicker to compute with."""
    if len(sizes) == 1:
        return (*sizes[0], 0)
    starts = accumulate((height * width for height, width in sizes[:-1]), initial=0)
    numbers = [(*size, start) for size, start in zip(sizes, starts, strict=True)]
    of_levels = torch.tensor(numbers, dtype=integer, device=device)
    height, width, start = of_levels.repeat_interleave(points // len(sizes), 0).repeat(heads, 1).unbind(1)
    return height.contiguous(), width.contiguous(), start.contiguous()


def _neighbours(position: Tensor, length: Length, integer: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Positions along an axis of `length` cells -> (cell, weight) before and after each, weight 0 outside."""
    if isinstance(length, Tensor):
        length = length.to(position.dtype)  # ops on two types are not vectorised on a CPU
    # All further outside is alike, but no number stays none: it is in `share`, and 0 times it is NaN.
    before = _limited(position.detach().floor(), -2, length).nan_to_num(nan=-2)
    after = before + 1
    share = position - before
    return [
        (_limited(before, 0, length - 1).to(integer), (1 - share) * _inside(before, length)),
        (_limited(after, 0, length - 1).to(integer), share * _inside(after, length)),
    ]


def _limited(x: Tensor, least: int, most: Length) -> Tensor:
    return x.clamp(least, most) if isinstance(most, int) else torch.minimum(x.clamp(min=least), most)


def _inside(cell: Tensor, length: Length) -> Tensor:
    """1.0 for whole numbers in 0..length-1, else 0.0: ops on truth values are not vectorised on a CPU."""
    return (length / 2 + 0.5 - (cell - (length - 1) / 2).abs()).clamp(0, 1)


def _sum_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """rows (R, D), index and weights (N, K) -> (N, D): sum over k of weights[n, k] * rows[index[n, k]]."""
    out = F.embedding_bag(index, rows.detach(), per_sample_weights=weights, mode="sum")
    return _GradientOfRows.apply(out, rows, index, weights.detach())  # type: ignore[no-any-return]


class _GradientOfRows(torch.autograd.Function):
    """Passes `out` through, and gives `rows` its gradient, ten times faster than embedding_bag does."""

    @staticmethod
    def forward(out: Tensor, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, rows, index, weights = inputs
        ctx.set_materialize_grads(False)
        ctx.num_rows = rows.shape[0]
        ctx.save_for_backward(index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None or not ctx.needs_input_grad[1]:
            return grad, None, None, None
        index, weights = ctx.saved_tensors
        row_of_entry, entry = index.flatten().sort()
        every_row = torch.arange(ctx.num_rows, dtype=index.dtype, device=index.device)
        start = torch.searchsorted(row_of_entry, every_row, out_int32=index.dtype == torch.int32)
        query_of_entry = (entry // index.shape[1]).to(index.dtype)
        scale = weights.flatten().index_select(0, entry)
        rows_grad = F.embedding_bag(
            query_of_entry, grad.contiguous(), start, per_sample_weights=scale, mode="sum"
        )
        return grad, rows_grad, None, None
