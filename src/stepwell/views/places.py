"""Which visual token stands for a point of an image, and which of its views shows it best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.structures import TokenGrid, TokenLayout

__all__ = ["finest_views", "tokens_at"]


def tokens_at(grids: Sequence[TokenGrid], points: Tensor) -> Tensor:
    """points (P, 2), x and y in source pixels -> (P,) indices among the visual tokens: of several grids that
    hold a point, the one with the smallest cells; -1 where none does.
    """
    found = torch.full((len(points),), -1)
    for box, rows in sorted(grids, key=_cell_area, reverse=True):
        left, top, right, bottom = box
        tokens = torch.tensor([list(row) for row in rows])
        x, y = (points[:, 0] - left) / (right - left), (points[:, 1] - top) / (bottom - top)
        row, col = (y * tokens.shape[0]).long(), (x * tokens.shape[1]).long()
        last_row, last_col = tokens.shape[0] - 1, tokens.shape[1] - 1
        here = tokens[row.clamp(0, last_row), col.clamp(0, last_col)]
        is_inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
        found = torch.where(is_inside, here, found)
    return found


def _cell_area(grid: TokenGrid) -> float:
    left, top, right, bottom = grid.box
    return (right - left) * (bottom - top) / (len(grid.rows) * len(grid.rows[0]))


def finest_views(layout: TokenLayout) -> range:
    """Indices of the views that show most detail: the tiles where there are some, or else the last view."""
    rows, cols = layout.tiles
    return range(rows * cols) if rows else range(len(layout.views) - 1, len(layout.views))
