"""Where cells and boxes are, as DINO's transformer is told: sines, valid parts of padded maps, proposals.

DINO, arXiv 2203.03605, and Deformable DETR, arXiv 2010.04159, appendix A.4 (two stages).
Letters: B batch, L levels, N cells of all levels, one after the other, D width, (h, w) the grid of a level,
(H, W) the padded batch in pixels. Boxes are centre x and y, width and height in parts of the valid image;
*logits* of boxes are what a sigmoid makes boxes of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.structures import Extent, Size

__all__ = ["Grids", "box_logits", "box_sines", "cell_proposals", "cell_references", "grids_of", "map_sines"]

TURN = 2 * math.pi


class Grids(NamedTuple):
    """The levels of a padded batch."""

    sizes: list[Size]
    valid: list[Tensor]  # (B, 2) of each level: rows and columns that hold image
    padding: Tensor  # (B, N), True where a cell is padding

    @property
    def shares(self) -> Tensor:
        """(B, L, 2): the valid part of each level's width and height, in this order."""
        parts = [
            counts.flip(1) / counts.new_tensor([width, height])
            for counts, (height, width) in zip(self.valid, self.sizes, strict=True)
        ]
        return torch.stack(parts, 1)


def grids_of(maps: Sequence[Tensor], extents: Sequence[Extent]) -> Grids:
    """maps: (B, D, h, w). A cell is padding where the pixel is that stands for it, as nearest-neighbour
    resizing of a mask tells.
    """
    height = max(extent.padded[0] for extent in extents)
    width = max(extent.padded[1] for extent in extents)
    device = maps[0].device
    image = torch.tensor([extent.valid for extent in extents], device=device)
    rows = (torch.arange(height, device=device) < image[:, :1]).float()[:, None]  # (B, 1, H)
    columns = (torch.arange(width, device=device) < image[:, 1:]).float()[:, None]
    sizes, valid, padding = [], [], []
    for x in maps:
        size = (x.shape[-2], x.shape[-1])
        down, across = F.interpolate(rows, size[0])[:, 0], F.interpolate(columns, size[1])[:, 0]
        sizes.append(size)
        valid.append(torch.stack([down.sum(1), across.sum(1)], 1))
        padding.append((down[:, :, None] * across[:, None] == 0).flatten(1))
    return Grids(sizes, valid, torch.cat(padding, 1))


def map_sines(grids: Grids, dim: int, *, temperature: float) -> Tensor:
    """(B, N, dim): sines of the row, then of the column, counted within the valid part.

    A padded column has row 0 and a padded row column 0, as running sums of a mask give them.
    """
    levels = []
    for (height, width), counts in zip(grids.sizes, grids.valid, strict=True):
        (rows, is_row), (columns, is_column) = (
            _axis(length, count, dim // 2, temperature)
            for length, count in ((height, counts[:, :1]), (width, counts[:, 1:]))
        )
        zero = _sines(counts.new_zeros(()), dim // 2, temperature)
        down = torch.where(is_column[:, None, :, None], rows[:, :, None], zero)
        across = torch.where(is_row[:, :, None, None], columns[:, None], zero)
        levels.append(torch.cat([down, across], -1).flatten(1, 2))
    return torch.cat(levels, 1)


def _axis(length: int, count: Tensor, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """count: (B, 1) of `length` cells that are valid -> their sines (B, length, dim), and which they are."""
    place = torch.arange(1, length + 1, dtype=count.dtype, device=count.device).expand(len(count), length)
    angles = torch.minimum(place, count) / (count + 1e-6) * TURN  # padding counts no further
    return _sines(angles, dim, temperature), place <= count


def box_sines(boxes: Tensor, dim: int, *, temperature: float) -> Tensor:
    """(..., 4) -> (..., 4 * dim): sines of centre y, centre x, width and height, each `dim` wide."""
    ordered = boxes[..., [1, 0, 2, 3]]
    return _sines(ordered * TURN, dim, temperature).flatten(-2)


def _sines(angles: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) -> (..., dim): sine and cosine in turn, of frequencies that fall."""
    channel = torch.arange(dim, dtype=angles.dtype, device=angles.device)
    scaled = angles[..., None] / temperature ** (2 * (channel // 2) / dim)
    return torch.stack([scaled[..., 0::2].sin(), scaled[..., 1::2].cos()], -1).flatten(-2)


def cell_references(grids: Grids) -> Tensor:
    """Centre (x, y) of every cell, told for every level: (B, N, L, 2) in parts of the padded maps."""
    centres = []
    for (height, width), counts in zip(grids.sizes, grids.valid, strict=True):
        rows, columns = _centres(height, width, counts)
        centres.append(torch.stack([columns / counts[:, 1:], rows / counts[:, :1]], -1))
    return torch.cat(centres, 1)[:, :, None] * grids.shares[:, None]


def cell_proposals(grids: Grids, *, side: float = 0.05) -> Tensor:
    """A box around every cell's centre, `side` * 2^level wide and high -> logits (B, N, 4), infinite where
    the cell is padding or the box is not within 0.01 and 0.99 in all its numbers.
    """
    proposals = []
    for level, ((height, width), counts) in enumerate(zip(grids.sizes, grids.valid, strict=True)):
        rows, columns = _centres(height, width, counts)
        centre = torch.stack([columns / counts[:, 1:], rows / counts[:, :1]], -1)
        proposals.append(torch.cat([centre, torch.full_like(centre, side * 2.0**level)], -1))
    boxes = torch.cat(proposals, 1)
    unfit = grids.padding | ~((boxes > 0.01) & (boxes < 0.99)).all(-1)
    return torch.log(boxes / (1 - boxes)).masked_fill(unfit[..., None], math.inf)


def _centres(height: int, width: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each cell's centre, (B, h*w) each, in cells."""
    rows = torch.arange(height, dtype=counts.dtype, device=counts.device) + 0.5
    columns = torch.arange(width, dtype=counts.dtype, device=counts.device) + 0.5
    grid = (len(counts), height, width)
    return rows[:, None].expand(grid).flatten(1), columns.expand(grid).flatten(1)


def box_logits(boxes: Tensor, *, eps: float) -> Tensor:
    """The inverse of the sigmoid, of numbers that are at least `eps` away from 0 and from 1."""
    boxes = boxes.clamp(0, 1)
    return torch.log(boxes.clamp(min=eps) / (1 - boxes).clamp(min=eps))
