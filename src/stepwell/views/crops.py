"""Local and global crops of an image, and beside them the whole of it at the size of a crop.

INF-LLaVA, arXiv 2407.16198, section 4.2, with the rules of its released code: an image becomes a multiple of
the encoder's square view each way, and both kinds of crops are cut out of that. Sizes are (height, width) in
pixels, grids (rows, columns); P is the side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.crops import Phases, middle, split_blocks, split_strides
from stepwell.ops.precision import at_least_single
from stepwell.structures import Box, Geometry, Size, Statistics, TokenLayout, TokenRun, View
from stepwell.views.preprocess import Square, square_box, squared, to_tensor

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

    def layout(self, size: Size) -> TokenLayout:
        """size (H, W) of the upright image, both at least 1. Raises ValueError otherwise."""
        if min(size) < 1:
            raise ValueError(f"an image needs at least one pixel each way, got {size[0]}x{size[1]}")
        rows, cols = grid = self.grid_of(size)
        num_local, global_crops, has_small = self.parts(grid)
        whole, cells = square_box(size, self.framing), self.side // self.stride
        boxes = [(f"local {k // cols + 1}.{k % cols + 1}", _part(whole, grid, k)) for k in range(num_local)]
        boxes += [(f"global {k // cols + 1}.{k % cols + 1}", whole) for k in global_crops]
        boxes += [("whole", whole)] * has_small
        small = (self.side, self.side)
        fine = small if self.enlarged else (rows * self.side, cols * self.side)
        takes_small = grid == (1, 1) or self.low == "resized"
        return TokenLayout(
            image_size=size,
            inputs=((fine,) if grid != (1, 1) else ()) + ((small,) if takes_small else ()),
            views=tuple(View(name=name, size=small, box=box, grid=(cells, cells)) for name, box in boxes),
            runs=(TokenRun(count=cells**2 * (math.prod(grid) if self.every_cell else 1)),),
            tiles=grid if num_local else (0, 0),
        )

    def grid_of(self, size: Size) -> Size:
        """The grid of crops for an image of `size`."""
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
        images = [squared(image, self.framing, size[0], self.mean) for size in layout.inputs]
        pairs = zip(images, layout.inputs, strict=True)
        return [to_tensor(framed, size, self.mean, self.std) for framed, size in pairs]

    def views(self, inputs: Sequence[Tensor], layout: TokenLayout) -> list[Tensor]:
        grid = self.grid_of(layout.image_size)
        if grid == (1, 1):
            return list(inputs)
        fine = _resized(inputs[0], (grid[0] * self.side, grid[1] * self.side))
        num_local, global_crops, has_small = self.parts(grid)
        cells = fine.movedim(0, -1)[None]
        crops = list(split_blocks(cells, grid)[0]) if num_local else []
        if global_crops:
            crops += list(split_strides(cells, grid, self._phases(grid))[0])
        views = [crop.movedim(-1, 0) for crop in crops]
        if has_small:
            views.append(inputs[1] if self.low == "resized" else _resized(inputs[0], (self.side, self.side)))
        return views


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
