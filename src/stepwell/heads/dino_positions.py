"""Where cells, points and boxes lie in the images of a padded batch, for DINO, and how places are told.

DINO, arXiv 2203.03605, on Deformable DETR, arXiv 2010.04159, appendix A.4 (proposals of an encoder).
Fractions are of an image's valid part; boxes are (centre x, centre y, width, height) in fractions.
Letters: B batch, L levels, (h, w) the grid of a level, N cells of all levels, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepwell.structures import Extent, Size

__all__ = [
    "Levels",
    "box_code",
    "cell_centres",
    "cell_code",
    "level_geometry",
    "proposals",
    "sine_code",
]

PROPOSED_SIDE = 0.05  # of a proposal on the finest level, in fractions; twice as long on each next one
WITHIN = (0.01, 0.99)  # a proposal with a coordinate outside is none


class Levels(NamedTuple):
    """The grids of a batch's maps, and which of their cells show the images."""

    sizes: tuple[Size, ...]
    rows: tuple[Tensor, ...]  # (B, h) of every level: rows that are not padding
    cols: tuple[Tensor, ...]  # (B, w)
    counts: Tensor  # (B, L, 2): valid columns and rows
    padding: Tensor | None  # (B, N): True where a cell is padding; None where no cell is

    @property
    def num_cells(self) -> int:
        return sum(height * width for height, width in self.sizes)


def level_geometry(
    sizes: Sequence[Size], extents: Sequence[Extent], *, dtype: torch.dtype, device: torch.device
) -> Levels:
    """sizes: (h, w) of every map of a batch, as large as the largest of the padded images.

    A cell is valid where the pixel that nearest resizing gives it is.
    """
    pixels = tuple(max(extent.padded[axis] for extent in extents) for axis in (0, 1))
    rows, cols = (
        [
            np.stack([_valid(size[axis], pixels[axis], extent.valid[axis]) for extent in extents])
            for size in sizes
        ]
        for axis in (0, 1)
    )
    counts = np.stack([np.stack([c.sum(1), r.sum(1)], -1) for r, c in zip(rows, cols, strict=True)], 1)
    padding = None
    if not all(bool(x.all()) for x in (*rows, *cols)):
        valid = [(r[:, :, None] & c[:, None]).reshape(len(r), -1) for r, c in zip(rows, cols, strict=True)]
        padding = torch.tensor(~np.concatenate(valid, 1), device=device)
    return Levels(
        tuple(sizes),
        tuple(torch.tensor(x, device=device) for x in rows),
        tuple(torch.tensor(x, device=device) for x in cols),
        torch.tensor(counts, device=device, dtype=dtype),
        padding,
    )


def _valid(cells: int, pixels: int, valid: int) -> NDArray[np.bool_]:
    """(cells,) which cells of an axis of so many pixels show one of the first `valid`. In NumPy: layouts are
    known before any tensor is, also where a graph is traced. Single precision, as torch's nearest resizing.
    """
    step = np.float32(pixels) / np.float32(cells)
    pixel = np.floor(np.arange(cells, dtype=np.float32) * step)
    shown: NDArray[np.bool_] = np.minimum(pixel, pixels - 1) < valid
    return shown


def cell_centres(levels: Levels) -> tuple[Tensor, Tensor]:
    """Columns and rows of all cell centres in fractions, (B, N) each."""
    x, y = [], []
    for level, (height, width) in enumerate(levels.sizes):
        cols, rows = (
            (torch.arange(n, device=levels.counts.device, dtype=levels.counts.dtype) + 0.5)
            / levels.counts[:, level, axis, None]
            for axis, n in enumerate((width, height))
        )
        x.append(cols[:, None].expand(-1, height, -1).flatten(1))
        y.append(rows[:, :, None].expand(-1, -1, width).flatten(1))
    return torch.cat(x, 1), torch.cat(y, 1)


def proposals(levels: Levels) -> tuple[Tensor, Tensor]:
    """A box around every cell: logits (B, N, 4), infinite where there is none; and where so, (B, N)."""
    x, y = cell_centres(levels)
    side = torch.cat(
        [x.new_full((h * w,), PROPOSED_SIDE * 2.0**level) for level, (h, w) in enumerate(levels.sizes)]
    )
    side = side.expand_as(x)
    boxes = torch.stack([x, y, side, side], -1)
    none = ~((boxes > WITHIN[0]) & (boxes < WITHIN[1])).all(-1)
    if levels.padding is not None:
        none = none | levels.padding
    logits = (boxes / (1 - boxes)).log()
    return logits.masked_fill(none[..., None], math.inf), none


def sine_code(places: Tensor, dim: int, *, temperature: float) -> Tensor:
    """Angles (...) -> (..., dim): sines and cosines in turn, of ever slower angles.

    "Attention is all you need", arXiv 1706.03762, section 3.5, with a temperature of its own.
    """
    pair = torch.arange(dim // 2, dtype=places.dtype, device=places.device)
    angles = places[..., None] / temperature ** (2 * pair / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def cell_code(levels: Levels, dim: int, *, temperature: float) -> Tensor:
    """The place of every cell, (B, N, dim): half of the channels for its row, half for its column, both
    counted among the valid ones and told as an angle; at a cell of padding they count as nought."""
    codes = []
    for rows, cols in zip(levels.rows, levels.cols, strict=True):
        y, x = (_count_code(valid, dim // 2, temperature, levels.counts.dtype) for valid in (rows, cols))
        nought = sine_code(y.new_zeros(()), dim // 2, temperature=temperature)
        y = torch.where(cols[:, None, :, None], y[:, :, None], nought)
        x = torch.where(rows[:, :, None, None], x[:, None], nought)
        codes.append(torch.cat([y, x], -1).flatten(1, 2))
    return torch.cat(codes, 1)


def _count_code(valid: Tensor, dim: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """(B, n) of an axis -> (B, n, dim)."""
    count = valid.to(dtype).cumsum(1)
    return sine_code(count / (count[:, -1:] + 1e-6) * (2 * math.pi), dim, temperature=temperature)


def box_code(boxes: Tensor, dim: int, *, temperature: float) -> Tensor:
    """(B, Q, 4) of x, y, width, height -> (B, Q, 4 * dim): y, x, width, height, a whole turn for one."""
    turned = boxes[..., [1, 0, 2, 3]] * (2 * math.pi)
    return sine_code(turned, dim, temperature=temperature).flatten(-2)
