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

from stepwell.ops.precision import at_least_single

__all__ = ["one_query_fast", "one_query_reference"]


def one_query_reference(
    queries: Tensor, codes: Tensor, cells: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """queries (n, s, h, d), scaled; codes (n, s, h, K), what is added to their products with the keys; of
    every level, cells (B, n, k, C) and the matrices that make keys of them, (h, d, C), and values, (h, C, d)
    -> (B, n, s, h, d).
    """
    pairs = zip(cells, keys, values, strict=True)
    key, value = (
        torch.cat(parts, 2)
        for parts in zip(
            *(
                (torch.einsum("bnkc,hdc->bnkhd", x, a), torch.einsum("bnkc,hcd->bnkhd", x, b))
                for x, a, b in pairs
            ),
            strict=True,
        )
    )
    weights = _softmax(torch.einsum("nshd,bnkhd->bnshk", queries, key) + codes)
    return torch.einsum("bnshk,bnkhd->bnshd", weights, value)


def one_query_fast(
    queries: Tensor, codes: Tensor, cells: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """As `one_query_reference`."""
    scores = []
    for level, key in zip(cells, keys, strict=True):
        asked = torch.einsum("nshd,hdc->nshc", queries, key)  # in the width of a cell
        scores.append(torch.einsum("nqc,bnkc->bnqk", asked.flatten(1, 2), level))
    weights = _softmax(torch.cat(scores, 3) + codes.flatten(1, 2))  # (B, n, s*h, K)
    shares = weights.split([level.shape[2] for level in cells], 3)
    levels = [
        torch.stack([_read(*view, value) for view in zip(share, level, strict=True)])
        for share, level, value in zip(shares, cells, values, strict=True)
    ]
    return torch.stack(levels).sum(0)


def _read(shares: Tensor, cells: Tensor, value: Tensor) -> Tensor:
    """shares (n, s*h, k) of the cells (n, k, C) of one view -> (n, s, h, d)."""
    sums = (shares @ cells).unflatten(1, (-1, len(value)))
    return torch.einsum("nshc,hcd->nshd", sums, value)


def _softmax(scores: Tensor) -> Tensor:
    """In fp32 at least: it loses its tails in half precision."""
    return scores.to(at_least_single(scores.dtype)).softmax(-1).to(scores.dtype)
