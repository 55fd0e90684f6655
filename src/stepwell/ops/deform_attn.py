"""Deformable attention: every query reads its own few points of a map, and sums them by weight.

Deformable DETR, arXiv 2010.04159, equation 2, for one level; the branches of PIIP (arXiv 2501.07783) talk
through it. Points are read bilinearly, cell centres lie at half pixels, and outside the map there is zero.
Letters: B batch, M heads, D width of a head, Nq queries, P points, (H, W) the grid that is sampled.

The fast twin sees that a query's output is a weighted sum of 4*P rows of a table, which is `embedding_bag`;
and that a row's gradient is the same sum with rows and queries in exchanged roles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import choose
from stepwell.structures import Size

__all__ = ["deform_attn", "deform_attn_fast", "deform_attn_reference"]


def deform_attn(value: Tensor, size: Size, locations: Tensor, weights: Tensor) -> Tensor:
    """value (B, H*W, M, D), size (H, W), locations (B, Nq, M, P, 2) as (x, y) in 0..1, weights (B, Nq, M, P)
    -> (B, Nq, M*D) in the dtype of `value`, heads side by side."""
    if value.shape[1] != size[0] * size[1]:
        raise ValueError(f"value has {value.shape[1]} tokens, but a grid of {size[0]}x{size[1]} cells")
    fast = choose(
        fast_ok=value.device.type in ("cpu", "meta"),
        why_not=f"deformable attention has a fast twin on CPU only, not on {value.device.type}",
    )
    exact = torch.promote_types(value.dtype, torch.float32)  # half precision would miss points by whole cells
    run = deform_attn_fast if fast else deform_attn_reference
    return run(value.to(exact), size, locations.to(exact), weights.to(exact)).to(value.dtype)


def deform_attn_reference(value: Tensor, size: Size, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deform_attn`, all tensors of one dtype."""
    maps = value.permute(0, 2, 3, 1).unflatten(3, size).flatten(0, 1)  # (B*M, D, H, W)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Nq, P, 2), -1 and 1 are the map's edges
    points = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    heads = (points * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B*M, D, Nq)
    return heads.view(value.shape[0], -1, *heads.shape[1:]).permute(0, 3, 1, 2).flatten(2)


def deform_attn_fast(value: Tensor, size: Size, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deform_attn`, all tensors of one dtype."""
    (batch, cells, heads, dim), (height, width) = value.shape, size
    small = max(batch * cells * heads, 4 * weights.numel()) < 2**31
    integer = torch.int32 if small else torch.int64  # half the memory to read, and a faster sort
    x, y = locations.unbind(-1)
    columns, lines = _neighbours(x, width, integer), _neighbours(y, height, integer)
    row = torch.arange(batch * cells * heads, dtype=integer, device=value.device).view(batch, cells, heads)
    first = row[:, :1, :, None]  # (B, 1, M, 1): the table's row of cell 0
    index = torch.cat([(i * width + j) * heads + first for i, _ in lines for j, _ in columns], -1)
    line_weights = [weights * near for _, near in lines]
    corner_weights = torch.cat([of_line * near for of_line in line_weights for _, near in columns], -1)
    out = _sum_rows(value.reshape(-1, dim), index.flatten(0, 2), corner_weights.flatten(0, 2))
    return out.view(batch, -1, heads * dim)


def _neighbours(position: Tensor, length: int, integer: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Position in 0..1 along an axis of `length` cells -> (cell, weight) below and above, 0 outside."""
    position = position * length - 0.5
    low = position.detach().floor()
    above = position - low
    cell = low.to(integer)  # what is no number becomes one far outside
    found = []
    for neighbour, near in ((cell, 1 - above), (cell + 1, above)):
        inside = neighbour.clamp(0, length - 1)
        found.append((inside, torch.where(inside == neighbour, near, 0)))
    return found


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
        ctx.num_rows = rows.shape[0]
        ctx.save_for_backward(index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.needs_input_grad[1]:
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
