"""An overview and a grid of slices that follows the aspect of the image, all about as large as one view.

LLaVA-UHD, arXiv 2403.11703, section 3.1; version 2, arXiv 2412.13871, keeps the rules. Sizes are (height,
width) in pixels, grids (rows, columns); S is the side of a square view, p the encoder's stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from stepwell.structures import Geometry, Region, Size, Statistics, TokenGrid, TokenLayout, TokenRun, View
from stepwell.views.preprocess import to_tensor
from stepwell.views.region import CLOSE_UP, RegionConfig, cut_around, moved, size_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Separator", "SliceGeometry", "SlicePlan", "long_side_size", "slice_plan", "total_area_size"]

Separator = str | tuple[int, ...]
"""What stands between visual tokens: a text, or token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicePlan:
    """grid: of slices, (0, 0) where there are none. slice_size: of each; overview: of the whole image."""

    overview: Size
    grid: Size = (0, 0)
    slice_size: Size = (0, 0)


def slice_plan(
    size: Size, *, side: int, stride: int, max_slices: int, never_split: bool = False
) -> SlicePlan:
    """How an image of `size` is cut; both sides at least 1. The official rounding, whose width follows from a
    rounded height, so that the same image lying on its side may have views of other sizes.

    A view has at most (S / p)**2 cells up to an aspect of as many to one; beyond, a single row or column of
    them, at most S / p * sqrt(aspect): 24 x 24 cells may become 3394 in a line at 20000:1.
    """
    count = min(math.ceil(size[0] * size[1] / side**2), max_slices)
    if count <= 1 or never_split:
        return SlicePlan(overview=_fitted(size, side, stride, may_grow=True))
    rows, cols = grid = _grid(size, count, max_slices)
    cell = (max(size[0] // rows, 1), max(size[1] // cols, 1))
    return SlicePlan(
        overview=_fitted(size, side, stride, may_grow=False),
        grid=grid,
        slice_size=_fitted(cell, side, stride, may_grow=True),
    )


def _grid(size: Size, count: int, max_slices: int) -> Size:
    """The grid of about `count` slices whose aspect is nearest to the image's, the first of equal ones."""
    aspect = math.log(size[1] / size[0])
    grids = (
        (number // cols, cols)
        for number in (count - 1, count, count + 1)
        if 1 < number <= max_slices
        for cols in range(1, number + 1)
        if number % cols == 0
    )
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))


def _fitted(size: Size, side: int, stride: int, *, may_grow: bool) -> Size:
    """About S x S pixels in the aspect of `size`, in whole cells."""
    height, width = size
    if height * width > side**2 or may_grow:
        aspect = width / height
        height = int(side / math.sqrt(aspect))
        width = int(height * aspect)
    return max(height // stride, 1) * stride, max(width // stride, 1) * stride


def long_side_size(size: Size, side: int) -> Size:
    """An image's size with its long side at `side`, as images are resized before official evaluations."""
    height, width = size
    if width > height:
        return max(int(side / width * height), 1), side
    return side, max(int(side / height * width), 1)


def total_area_size(size: Size, area: int) -> Size:
    """An image's size with `area` pixels in its aspect, as a tenth of the official training images are."""
    scale = math.sqrt(area / (size[0] * size[1]))
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceGeometry(Geometry):
    """Layouts and inputs of an overview and its slices; inputs and views are the slices row by row, and the
    overview behind them.

    levels: of the pyramid that each view becomes, 0 for the encoder's own grid, each further one twice the
    size. token_grid: of the visual tokens of one view. organised: the slices' tokens make one map, with
    `newline` behind each of its rows, and `comma` before the overview's; or else the tokens of every slice
    are followed by `comma`, at the end of a row of slices by `newline`. before_overview: "first" writes what
    the released code does, the separator behind the first slice: a newline where there is one column.
    long_side: of the image before it is sliced; None is its own.
    """

    name: str
    side: int
    stride: int
    max_slices: int
    never_split: bool
    token_grid: Size
    organised: bool
    newline: Separator
    comma: Separator
    before_overview: Literal["comma", "first"]
    long_side: int | None
    mean: Statistics
    std: Statistics
    levels: tuple[int, ...] = (0,)
    region: RegionConfig = CLOSE_UP

    def layout(self, size: Size) -> TokenLayout:
        """size (H, W) of the upright image, both at least 1. Raises ValueError otherwise."""
        if min(size) < 1:
            raise ValueError(f"an image needs at least one pixel each way, got {size[0]}x{size[1]}")
        return self._layout(size, self._plan(size), None)

    def close_up(self, size: Size, region: Region) -> TokenLayout:
        least = self.side / self.region.enlarged(region)
        cut = cut_around(region, size, self.region, (least, least))
        plan = self._plan(size_of(cut))
        if plan.grid == (0, 0):
            plan = replace(plan, grid=(1, 1), slice_size=plan.overview)
        layout = self._layout(size, replace(plan, overview=self._plan(size).overview), cut)
        return replace(layout, region=region)

    def _layout(self, size: Size, plan: SlicePlan, cut: Region | None) -> TokenLayout:
        """cut: what lies on the slices; None: all of the image."""
        part = (0, 0, size[1], size[0]) if cut is None else cut
        (rows, cols), (height, width) = plan.grid, size_of(part)
        of_slice, of_overview = self._maps(plan.slice_size), self._maps(plan.overview)
        views = [
            View(
                name=f"slice {row + 1}.{col + 1}",
                size=plan.slice_size,
                box=moved(
                    (
                        width * col / cols,
                        height * row / rows,
                        width * (col + 1) / cols,
                        height * (row + 1) / rows,
                    ),
                    part,
                ),
                grid=of_slice[0],
                maps=of_slice[1:],
            )
            for row in range(rows)
            for col in range(cols)
        ]
        box, (grid, *maps) = (0.0, 0.0, float(size[1]), float(size[0])), of_overview
        views.append(View(name="overview", size=plan.overview, box=box, grid=grid, maps=tuple(maps)))
        return TokenLayout(
            image_size=size,
            inputs=tuple(view.size for view in views),
            views=tuple(views),
            runs=self._runs(plan.grid),
            tiles=plan.grid,
            token_grid=self.token_grid,
            grids=tuple(self._grids(plan.grid, views)),
            cut=cut,
        )

    def inputs(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        whole = self._resized(image)
        overview = to_tensor(whole, layout.inputs[-1], self.mean, self.std)
        if layout.tiles == (0, 0):
            return [overview]
        (rows, cols), (height, width) = layout.tiles, layout.inputs[0]
        fine = whole if layout.cut is None else self._resized(image.crop(layout.cut))
        pixels = to_tensor(fine, (rows * height, cols * width), self.mean, self.std)
        slices = (part for row in pixels.split(height, dim=1) for part in row.split(width, dim=2))
        return [*slices, overview]

    def _resized(self, image: Image) -> Image:
        if self.long_side is None:
            return image
        height, width = long_side_size((image.height, image.width), self.long_side)
        return image.resize((width, height))

    def resized(self, size: Size, *, slices: int) -> Size:
        """An image's size with the area of `slices` views, its own where it is cut into as many already."""
        if math.prod(self._plan(size).grid) == slices:
            return size
        return total_area_size(size, slices * self.side**2)

    def _plan(self, size: Size) -> SlicePlan:
        return slice_plan(
            size if self.long_side is None else long_side_size(size, self.long_side),
            side=self.side,
            stride=self.stride,
            max_slices=self.max_slices,
            never_split=self.never_split,
        )

    def _maps(self, size: Size) -> tuple[Size, ...]:
        """The grid of the encoder, and those of all levels where there are further ones."""
        rows, cols = size[0] // self.stride, size[1] // self.stride
        levels = tuple((rows * 2**level, cols * 2**level) for level in self.levels)
        return ((rows, cols), *levels) if self.levels != (0,) else ((rows, cols),)

    def _runs(self, grid: Size) -> tuple[TokenRun, ...]:
        (rows, cols), (token_rows, token_cols) = grid, self.token_grid
        newline, comma = _run(self.newline), _run(self.comma)
        view = TokenRun(count=token_rows * token_cols)
        if not rows:
            return (view,)
        if not self.organised:
            return (*((view, comma) * (cols - 1) + (view, newline)) * rows, view)
        row = (TokenRun(count=cols * token_cols), newline)
        first = newline if cols == 1 and self.before_overview == "first" else comma
        return (*row * (rows * token_rows), first, view)

    def _grids(self, grid: Size, views: Sequence[View]) -> Iterator[TokenGrid]:
        (rows, cols), (token_rows, token_cols) = grid, self.token_grid
        of_view, step = token_rows * token_cols, cols * token_cols
        for k, view in enumerate(views[:-1]):
            row, col = divmod(k, cols)
            if self.organised:
                first = row * token_rows * step + col * token_cols
                yield TokenGrid.over(view.box, self.token_grid, first=first, step=step)
            else:
                yield TokenGrid.over(view.box, self.token_grid, first=k * of_view)
        yield TokenGrid.over(views[-1].box, self.token_grid, first=rows * cols * of_view)


def _run(separator: Separator) -> TokenRun:
    return TokenRun(text=separator) if isinstance(separator, str) else TokenRun(ids=separator)
