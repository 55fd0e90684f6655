"""Local and global crops of an image, and beside them the whole of it at the size of a crop.

INF-LLaVA, arXiv 2407.16198, section 4.2, with the rules of its released code: an image becomes a multiple of
the encoder's square view each way, and both kinds of crops are cut out of that. Sizes are (height, width) in
pixels, grids (rows, columns); P is the side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.crops import Phases, middle, split_blocks, split_strides
from stepwell.ops.precision import at_least_single
from stepwell.structures import (
    Box,
    Geometry,
    Region,
    Size,
    Statistics,
    TokenGrid,
    TokenLayout,
    TokenRun,
    View,
)
from stepwell.views.preprocess import Square, square_box, squared, to_tensor
from stepwell.views.region import CLOSE_UP, RegionConfig, cut_around, moved, size_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CropGeometry", "LowView", "nearest_grid"]

LowView = Literal["sampled", "resized", "none"]
"""The small view of the whole: of the fine image, without a low-pass filter, as the code does; of the source,
with one; or left out.
"""


def nearest_grid(size: Size, max_crops: int) -> Size:
    """Of the grids of at most `max_crops` crops the one whose aspect is nearest to the image's, and of equal
    ones the largest.
    """
    aspect = math.log(size[1] / size[0])
    grids = [(rows, cols) for rows in range(1, max_crops + 1) for cols in range(1, max_crops // rows + 1)]
    return min(grids, key=lambda grid: (abs(math.log(grid[1] / grid[0]) - aspect), -math.prod(grid)))


@dataclass(frozen=True, kw_only=True, slots=True)
class CropGeometry(Geometry):
    """Layouts and inputs of crops. Views are the local crops row by row, the global ones, and the small view,
    where each is wanted.

    grid: None is the nearest of at most `max_crops`; one of 1x1 leaves the small view alone, which is then
    made of the source. global_crops: "middle" are those that `ops.crops.middle` tells. A small view that is
    "sampled" is one of the global crops where both sides of the grid are odd, and not encoded twice.
    enlarged: the image is first resized to P x P and made large from there, as the official loader does.
    """

    name: str
    side: int
    stride: int
    framing: Square
    grid: Size | None
    max_crops: int
    local_crops: bool
    global_crops: Literal["all", "middle", "none"]
    low: LowView
    enlarged: bool
    every_cell: bool  # is a visual token; else there are as many as cells of a view
    mean: Statistics
    std: Statistics
    region: RegionConfig = CLOSE_UP

    def layout(self, size: Size) -> TokenLayout:
        """size (H, W) of the upright image, both at least 1. Raises ValueError otherwise."""
        if min(size) < 1:
            raise ValueError(f"an image needs at least one pixel each way, got {size[0]}x{size[1]}")
        return self._layout(size, None)

    def close_up(self, size: Size, region: Region) -> TokenLayout:
        """The local crops are of the cut, the global ones and the small view of the whole."""
        least = self.side / self.region.enlarged(region)
        cut = cut_around(region, size, self.region, (least, least))
        num_local, global_crops, has_small = self.parts(self.grid_of(size_of(cut)))
        if not num_local and self.grid is None and self.local_crops and self.max_crops > 1:
            height, width = size_of(cut)
            raise ValueError(
                f"a part of {width} x {height} pixels is one crop of at most {self.max_crops}; give a longer "
                "region, or more max_crops"
            )
        if not num_local or not (global_crops or has_small):
            return Geometry.close_up(self, size, region)
        return replace(self._layout(size, cut), region=region)

    def _layout(self, size: Size, cut: Region | None) -> TokenLayout:
        """cut: what the local crops show; None: all of the image."""
        part = (0, 0, size[1], size[0]) if cut is None else cut
        rows, cols = grid = self.grid_of(size_of(part))
        num_local, global_crops, has_small = self.parts(grid)
        whole, cells = square_box(size, self.framing), self.side // self.stride
        near = moved(square_box(size_of(part), self._cut_framing if cut else self.framing), part)
        boxes = [(f"local {k // cols + 1}.{k % cols + 1}", _part(near, grid, k)) for k in range(num_local)]
        boxes += [(f"global {k // cols + 1}.{k % cols + 1}", whole) for k in global_crops]
        boxes += [("whole", whole)] * has_small
        small = (self.side, self.side)
        fine = small if self.enlarged else (rows * self.side, cols * self.side)
        takes_small = grid == (1, 1) or self.low == "resized"
        takes_whole = cut is not None and (bool(global_crops) or self.low == "sampled")
        num_fine = int(grid != (1, 1)) + int(takes_whole)
        tokens = (cells * rows, cells * cols) if self.every_cell else (cells, cells)
        return TokenLayout(
            image_size=size,
            inputs=(fine,) * num_fine + (small,) * takes_small,
            views=tuple(View(name=name, size=small, box=box, grid=(cells, cells)) for name, box in boxes),
            runs=(TokenRun(count=tokens[0] * tokens[1]),),
            grids=(TokenGrid.over(near if num_local else whole, tokens),),
            tiles=grid if num_local else (0, 0),
            cut=cut,
        )

    @property
    def _cut_framing(self) -> Square:
        """Of a cut that is no square: nothing of it is left out."""
        return "pad" if self.framing == "crop" else self.framing

    def grid_of(self, size: Size) -> Size:
        """The grid of crops for an image, or a cut of one, of `size`."""
        return self.grid or nearest_grid(size, self.max_crops)

    def parts(self, grid: Size) -> tuple[int, list[int], bool]:
        """How many local crops are views, which global ones are, and whether the small view is one.

        Where none is and there is a small view, it is the global crop in the middle.
        """
        if grid == (1, 1):
            return 0, [], True
        rows, cols = grid
        phases = self._phases(grid)
        crops = [row * cols + col for row in phases[0] for col in phases[1]]
        is_crop = bool(crops) and self.low == "sampled" and rows % 2 == cols % 2 == 1
        has_small = self.low != "none" and not is_crop
        return math.prod(grid) if self.local_crops else 0, crops, has_small

    def _phases(self, grid: Size) -> Phases:
        if self.global_crops == "none":
            return range(0), range(0)
        few = self.global_crops == "middle"
        return (middle(grid[0]), middle(grid[1])) if few else (range(grid[0]), range(grid[1]))

    def inputs(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        parts = [(image, self.framing)] * len(layout.inputs)
        if layout.cut is not None:
            parts[0] = (image.crop(layout.cut), self._cut_framing)
        return [
            to_tensor(squared(part, framing, size[0], self.mean), size, self.mean, self.std)
            for (part, framing), size in zip(parts, layout.inputs, strict=True)
        ]

    def views(self, inputs: Sequence[Tensor], layout: TokenLayout) -> list[Tensor]:
        grid = self.grid_of(layout.fine_size)
        if grid == (1, 1):
            return list(inputs)
        whole = inputs[0] if layout.cut is None else inputs[1]
        num_local, global_crops, has_small = self.parts(grid)
        crops = list(split_blocks(self._fine(inputs[0], grid), grid)[0]) if num_local else []
        if global_crops:
            crops += list(split_strides(self._fine(whole, grid), grid, self._phases(grid))[0])
        views = [crop.movedim(-1, 0) for crop in crops]
        if has_small:
            views.append(inputs[-1] if self.low == "resized" else _resized(whole, (self.side, self.side)))
        return views

    def _fine(self, image: Tensor, grid: Size) -> Tensor:
        """(3, h, w) -> (1, H, W, 3), as large as the crops of a grid."""
        return _resized(image, (grid[0] * self.side, grid[1] * self.side)).movedim(0, -1)[None]


def _part(box: Box, grid: Size, k: int) -> Box:
    """Part k of a box, row by row."""
    (left, top, right, bottom), (rows, cols) = box, grid
    row, col = divmod(k, cols)
    width, height = (right - left) / cols, (bottom - top) / rows
    return (left + col * width, top + row * height, left + (col + 1) * width, top + (row + 1) * height)


def _resized(image: Tensor, size: Size) -> Tensor:
    """(3, h, w) -> (3, *size), bicubic without a low-pass filter, corners not aligned."""
    if image.shape[1:] == size:
        return image
    exact = image[None].to(at_least_single(image.dtype))
    return F.interpolate(exact, size, mode="bicubic", align_corners=False)[0].to(image.dtype)
