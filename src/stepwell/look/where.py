"""Weights of visual tokens over the image: a heat map, and the box that holds most of what lies at its peak.

Letters: N visual tokens of an image, (H, W) the grid of a heat map.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell.structures import Box, TokenGrid, TokenLayout

__all__ = ["Heat", "box_at_peak", "heat_map"]

MOST_CELLS = 512
"""Of a heat map, each way."""
SHARE = 0.5
"""Of the heat, that a box holds."""


class Heat(NamedTuple):
    """What lies on each cell of a grid over a part of the image."""

    map: Tensor  # (H, W); its sum is what was given of all tokens with a place in the image
    box: Box  # the part, in source pixels

    def cells(self, rows: tuple[int, int], cols: tuple[int, int]) -> Box:
        """The box of cells from the first row and column to the last, these included."""
        left, top, right, bottom = self.box
        height, width = (bottom - top) / self.map.shape[0], (right - left) / self.map.shape[1]
        return (
            left + cols[0] * width,
            top + rows[0] * height,
            left + (cols[1] + 1) * width,
            top + (rows[1] + 1) * height,
        )


def heat_map(layout: TokenLayout, weights: Tensor) -> Heat:
    """weights (N,) -> a map over what the tokens see of the image, in the smallest cells of their grids.

    A token's weight is spread evenly over its cell, and over all of them where it has several; what lies
    beside the image is left out. Raises ValueError for another number of weights than tokens, and where no
    token has a place.
    """
    if weights.shape != (layout.num_visual,):
        raise ValueError(
            f"{layout.num_visual} visual tokens need as many weights, got {tuple(weights.shape)}"
        )
    if not layout.grids:
        raise ValueError("the visual tokens of this system have no place in the image")
    height, width = layout.image_size
    edges = torch.tensor([grid.box for grid in layout.grids]).T
    low, high = edges[:2].amin(1).clamp(min=0), edges[2:].amax(1)
    left, top = low.tolist()
    right, bottom = min(float(high[0]), float(width)), min(float(high[1]), float(height))
    rows = _count(bottom - top, min(_cell(grid)[0] for grid in layout.grids))
    cols = _count(right - left, min(_cell(grid)[1] for grid in layout.grids))
    times = Counter(token for grid in layout.grids for row in grid.rows for token in row)
    given = weights.detach().double().cpu()
    heat = torch.zeros(rows, cols, dtype=torch.float64)
    for grid in layout.grids:
        tokens = torch.tensor([list(row) for row in grid.rows])
        numbers = torch.tensor([times[token] for token in tokens.flatten().tolist()]).view_as(tokens)
        cells = torch.where(tokens < 0, 0.0, given[tokens.clamp(min=0)]) / numbers
        down = _shares(top, bottom, rows, grid.box[1], grid.box[3], tokens.shape[0])
        across = _shares(left, right, cols, grid.box[0], grid.box[2], tokens.shape[1])
        heat += down @ cells @ across.T
    return Heat(heat.float(), (left, top, right, bottom))


def box_at_peak(heat: Heat, share: float = SHARE) -> Box:
    """The box that begins as the hottest cell, and takes in a row or a column beside it, the one with the
    most heat a cell, until it holds `share` of all heat. Raises ValueError where there is none.
    """
    values = heat.map.double()
    total = float(values.sum())
    if not total > 0:
        raise ValueError("nothing was taken of the image: there is no heat to put a box around")
    (height, width), peak = values.shape, int(values.argmax())
    top = bottom = peak // width
    left = right = peak % width
    while float(values[top : bottom + 1, left : right + 1].sum()) < share * total:
        sides = {}
        if top:
            sides["top"] = values[top - 1, left : right + 1]
        if bottom < height - 1:
            sides["bottom"] = values[bottom + 1, left : right + 1]
        if left:
            sides["left"] = values[top : bottom + 1, left - 1]
        if right < width - 1:
            sides["right"] = values[top : bottom + 1, right + 1]
        if not sides:
            break
        side = max(sides, key=lambda name: float(sides[name].mean()))
        top, bottom = top - (side == "top"), bottom + (side == "bottom")
        left, right = left - (side == "left"), right + (side == "right")
    return heat.cells((top, bottom), (left, right))


def _cell(grid: TokenGrid) -> tuple[float, float]:
    """Height and width of a cell."""
    left, top, right, bottom = grid.box
    return (bottom - top) / len(grid.rows), (right - left) / len(grid.rows[0])


def _count(length: float, cell: float) -> int:
    return max(1, min(MOST_CELLS, round(length / cell)))


def _shares(first: float, last: float, count: int, start: float, end: float, number: int) -> Tensor:
    """(count, number): the share of each of `number` cells from `start` to `end` that lies in each of `count`
    cells from `first` to `last`.
    """
    ours = torch.linspace(first, last, count + 1, dtype=torch.float64)
    theirs = torch.linspace(start, end, number + 1, dtype=torch.float64)
    low = torch.maximum(ours[:-1, None], theirs[:-1])
    high = torch.minimum(ours[1:, None], theirs[1:])
    return (high - low).clamp(min=0) / (theirs[1:] - theirs[:-1])
