"""Deformable attention: every query reads its own few points of a map, or of several, and sums them up.

Deformable DETR, arXiv 2010.04159, equations 2 and 3: the branches of PIIP (arXiv 2501.07783) talk through one
level, DINO (arXiv 2203.03605) reads several. Points are read bilinearly, and outside the map there is zero. A
place that is no finite number gives NaN.
Letters: B batch, M heads, D width of a head, Nq queries, L levels, P points, (H, W) the grid that is sampled;
x and y the column and row of a point, counted in cells from the centre of the first.

The fast twin sees that a query's output is a weighted sum of 4*L*P rows of a table, which is `embedding_bag`;
and that a row's gradient is the same sum with rows and queries in exchanged roles. It works on flat (B, Nq,
M*P) planes: axes of four points or two coordinates are too short for vectorised loops.
"""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["deform_attn", "deform_attn_fast", "deform_attn_levels", "deform_attn_reference"]


def deform_attn(value: Tensor, size: Size, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """value (B, H*W, M, D), size (H, W); x, y and weights (B, Nq, M, P), x and y in cells of the grid
    -> (B, Nq, M*D) in the dtype of `value`, heads side by side."""
    return deform_attn_levels(value, [size], x[..., None, :], y[..., None, :], weights[..., None, :])


def deform_attn_levels(value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """As `deform_attn`, of several maps: value (B, sum of H*W, M, D), one map after the other; x, y and
    weights (B, Nq, M, L, P), in cells of each one's grid. Raises ValueError for other numbers of tokens or
    levels.
    """
    tokens = sum(height * width for height, width in sizes)
    if value.shape[1] != tokens:
        grids = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(f"value has {value.shape[1]} tokens, but grids of {grids} cells have {tokens}")
    if weights.shape[3] != len(sizes):
        raise ValueError(f"points lie on {weights.shape[3]} levels, but there are {len(sizes)} grids")
    fast = choose(
        fast_ok=value.device.type in ("cpu", "meta"),
        why_not=f"deformable attention has a fast twin on CPU only, not on {value.device.type}",
    )
    exact = at_least_single(value.dtype)  # half precision would miss points by whole cells
    run = deform_attn_fast if fast else deform_attn_reference
    return run(value.to(exact), sizes, x.to(exact), y.to(exact), weights.to(exact)).to(value.dtype)


def deform_attn_reference(
    value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor
) -> Tensor:
    """As `deform_attn_levels`, all tensors of one dtype."""
    maps = value.split([height * width for height, width in sizes], dim=1)
    points = zip(x.unbind(3), y.unbind(3), weights.unbind(3), strict=True)
    parts = [_sample(level, size, *at) for level, size, at in zip(maps, sizes, points, strict=True)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _sample(value: Tensor, size: Size, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Of one level: value (B, H*W, M, D); x, y and weights (B, Nq, M, P)."""
    maps = value.permute(0, 2, 3, 1).unflatten(3, size).flatten(0, 1)  # (B*M, D, H, W)
    grid = torch.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], -1)  # -1 and 1 are the edges
    grid = grid.transpose(1, 2).flatten(0, 1)  # (B*M, Nq, P, 2)
    points = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = weights + 0 * (x + y)  # NaN where a place is none: on GPUs grid_sample reads zeros there
    heads = (points * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B*M, D, Nq)
    out: Tensor = heads.unflatten(0, (value.shape[0], value.shape[2]))
    return out.permute(0, 3, 1, 2).flatten(2)


def deform_attn_fast(value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """As `deform_attn_levels`, all tensors of one dtype."""
    out = in_parts(lambda *queries: _read(value, sizes, *queries), x, y, weights)
    return with_derivatives_of(
        lambda value, *queries: deform_attn_reference(value, sizes, *queries), (value, x, y, weights), out
    )


def _read(value: Tensor, sizes: Sequence[Size], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    (batch, cells, heads, dim), (_, queries, _, _, points) = value.shape, weights.shape
    small = max(batch * cells * heads, 4 * weights.numel()) < 2**31
    integer = torch.int32 if small else torch.int64  # half the memory to read, and a faster sort
    head = torch.arange(heads, dtype=integer, device=value.device).repeat_interleave(points)
    first = torch.arange(batch, dtype=integer, device=value.device).view(-1, 1, 1) * (cells * heads) + head

    levels = zip(*(plane.unbind(3) for plane in (x, y, weights)), strict=True)
    starts = accumulate((height * width * heads for height, width in sizes), initial=0)
    bags = (batch * queries * heads, 4 * points)
    indices, shares = [], []
    for start, (height, width), level in zip(starts, sizes, levels, strict=False):
        level_x, level_y, level_weights = (plane.flatten(2) for plane in level)
        columns = [(cell * heads, near) for cell, near in _neighbours(level_x, width, integer)]
        lines = [
            (cell * (width * heads) + (first + start), near * level_weights)
            for cell, near in _neighbours(level_y, height, integer)
        ]
        index = torch.stack([line + column for line, _ in lines for column, _ in columns], -1)
        corners = torch.stack([above * beside for _, above in lines for _, beside in columns], -1)
        indices.append(index.view(bags))
        shares.append(corners.view(bags))
    out = _sum_rows(value.flatten(0, 2), torch.cat(indices, 1), torch.cat(shares, 1))
    return out.view(batch, queries, heads * dim)


def _neighbours(position: Tensor, length: int, integer: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Positions along an axis of `length` cells -> (cell, weight) before and after each, weight 0 outside."""
    # All further outside is alike, but no number stays none: it is in `share`, and 0 times it is NaN.
    before = position.detach().floor().clamp(-2, length).nan_to_num(nan=-2)
    after = before + 1
    share = position - before
    return [
        (before.clamp(0, length - 1).to(integer), (1 - share) * _inside(before, length)),
        (after.clamp(0, length - 1).to(integer), share * _inside(after, length)),
    ]


def _inside(cell: Tensor, length: int) -> Tensor:
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
