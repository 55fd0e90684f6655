"""Boxes that stand on the cells of every map, which a region proposal network moves and scores.

Ren et al., arXiv 1506.01497, section 3.1.1; Lin et al., arXiv 1612.03144, section 4.1 (one scale a level).
Letters: A anchors of a cell, (h, w) a map's grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.structures import Extent, Size

__all__ = ["AnchorConfig", "are_valid", "base_anchors", "grid_anchors"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AnchorConfig:
    """scales: sides by the map's stride. ratios: height by width. offset: of an anchor's centre from the
    corner of its cell, in strides.
    """

    scales: tuple[float, ...] = (8.0,)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    offset: float = 0.0

    @property
    def num_per_cell(self) -> int:
        return len(self.scales) * len(self.ratios)


def base_anchors(stride: float, config: AnchorConfig) -> list[tuple[float, float, float, float]]:
    """Boxes of the first cell, ratio after ratio, not rounded to pixels."""
    centre = config.offset * stride
    boxes = []
    for ratio in config.ratios:
        for scale in config.scales:
            width = stride * scale / math.sqrt(ratio)
            height = stride * scale * math.sqrt(ratio)
            boxes.append((centre - width / 2, centre - height / 2, centre + width / 2, centre + height / 2))
    return boxes


def grid_anchors(grid: Size, stride: float, config: AnchorConfig, like: Tensor) -> Tensor:
    """(h*w*A, 4) in the order row, column, anchor; dtype and device of `like`."""
    rows, cols = grid
    y = torch.arange(rows, dtype=like.dtype, device=like.device) * stride
    x = torch.arange(cols, dtype=like.dtype, device=like.device) * stride
    corners = torch.stack([x.expand(rows, cols), y[:, None].expand(rows, cols)] * 2, dim=-1)
    return (corners[:, :, None] + corners.new_tensor(base_anchors(stride, config))).flatten(0, 2)


def are_valid(
    grids: Sequence[Size],
    strides: Sequence[float],
    extent: Extent,
    anchors_per_cell: int,
    device: torch.device,
) -> Tensor:
    """Whether an anchor's cell lies in the image with its own padding: (sum of h*w*A,), level after level."""
    height, width = extent.padded
    valid = []
    for (rows, cols), stride in zip(grids, strides, strict=True):
        row_is_inside = torch.arange(rows, device=device) < math.ceil(height / stride)
        col_is_inside = torch.arange(cols, device=device) < math.ceil(width / stride)
        cells = row_is_inside[:, None] & col_is_inside
        valid.append(cells.flatten().repeat_interleave(anchors_per_cell))
    return torch.cat(valid)
