"""Attention in windows that have a few queries each, over cells that are keys and values at once.

LLaVA-UHD v2 (arXiv 2412.13871, equation 7) reads its pyramid so, with one query a window, or four. A key is a
matrix times a cell: its product with a query is that of the cell with the query times the matrix. A sum of
values is their matrix times a sum of cells. Where a window has fewer queries than cells that spares most of
the work, and queries are multiplied once for all views.
Letters: B views, n windows, s queries of each, h heads of width d; of every level k cells of width C; K cells
of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["one_query_fast", "one_query_reference"]


def one_query_reference(
    queries: Tensor,
    codes: Tensor,
    cells: Sequence[Tensor],
    keys: Sequence[Tensor],
    value: Tensor,
    bias: Tensor,
) -> Tensor:
    """queries (n, s, h, d), scaled; codes (n, s, h, K), what is added to their products with the keys, in
    fp32 at least, so that the softmax is, which loses its tails in half precision; of every level, cells
    (B, n, k, C) and the matrix (h, d, C) that makes keys of them; of all levels one below the other, the
    matrices that make values (h, sum C, d), and the values' bias (h, d) -> (B, n, s, h, d).
    """
    by_level = value.split([level.shape[3] for level in cells], 1)
    key = torch.cat([torch.einsum("bnkc,hdc->bnkhd", *level) for level in zip(cells, keys, strict=True)], 2)
    values = [torch.einsum("bnkc,hcd->bnkhd", *level) for level in zip(cells, by_level, strict=True)]
    scores = torch.einsum("nshd,bnkhd->bnshk", queries, key) + codes
    weights = scores.softmax(-1).to(value.dtype)
    return torch.einsum("bnshk,bnkhd->bnshd", weights, torch.cat(values, 2) + bias)


def one_query_fast(
    queries: Tensor,
    codes: Tensor,
    cells: Sequence[Tensor],
    keys: Sequence[Tensor],
    value: Tensor,
    bias: Tensor,
) -> Tensor:
    """As `one_query_reference`."""
    scores = []
    for level, key in zip(cells, keys, strict=True):
        asked = torch.einsum("nshd,hdc->nshc", queries, key)  # in the width of a cell
        scores.append(torch.einsum("nqc,bnkc->bnqk", asked.flatten(1, 2), level))
    weights = (torch.cat(scores, 3) + codes.flatten(1, 2)).softmax(3).to(queries.dtype)  # (B, n, s*h, K)
    shares = weights.split([level.shape[2] for level in cells], 3)
    views = zip(*(zip(*level, strict=True) for level in zip(shares, cells, strict=True)), strict=True)
    read = torch.stack([_read(levels, value, bias) for levels in views])  # (B, h, n*s, d)
    out: Tensor = read.unflatten(2, queries.shape[:2]).movedim(1, 3)
    return out


def _read(levels: Sequence[tuple[Tensor, Tensor]], value: Tensor, bias: Tensor) -> Tensor:
    """Of every level of one view, shares (n, s*h, k) and cells (n, k, C) -> (h, n*s, d). One product of all
    levels and the bias: in half precision a sum of several would be rounded as often.
    """
    sums = torch.cat([share @ cells for share, cells in levels], 2)
    by_head = sums.unflatten(1, (-1, len(value))).flatten(0, 1).transpose(0, 1)  # (h, n*s, sum C)
    return torch.baddbmm(bias[:, None], by_head, value)
