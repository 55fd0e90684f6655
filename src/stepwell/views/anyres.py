"""AnyRes: the whole image in a square, and the image in its aspect on a grid of square tiles.

LLaVA-NeXT (llava-vl.github.io, January 2024, and its code); LLaVA-OneVision, arXiv 2408.03326, limits the
tokens. Sizes and grids are (height, width) and (rows, columns), as everywhere here and in transformers;
LLaVA's own files write widths first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from PIL import Image
from torch import Tensor

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
from stepwell.views.preprocess import to_tensor
from stepwell.views.pyramid import Framing, PyramidGeometry
from stepwell.views.region import CLOSE_UP, RegionConfig, cut_around, moved, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "AnyResGeometry",
    "Floor",
    "TileMerging",
    "TilePlan",
    "best_target",
    "fitted_size",
    "limited_cells",
    "tile_grids",
    "unpadded_cells",
]

TileMerging = Literal["flat", "spatial", "spatial_unpad"]
"""How the tokens of tiles follow those of the overview: tile after tile; row after row of the map that the
tiles make; or so without the map's padding, with a learned newline behind each row.
"""
Floor = Literal["exact", "float"]
"""Of the cells that an image fills: in whole numbers; or as LLaVA's code rounds a product of floats, which
may lie just under a whole number: 14 for 55 * (48 / 176).
"""


def tile_grids(text: str) -> tuple[Size, ...]:
    """A range in LLaVA's notation, columns first, such as "(1x1),...,(6x6)" -> all grids in it, in LLaVA's
    order. Raises ValueError for another text.
    """
    match = re.fullmatch(r"\s*\((\d+)x(\d+)\)\s*,\s*\.\.\.\s*,\s*\((\d+)x(\d+)\)\s*", text)
    if match is None:
        raise ValueError(f'a range of grids reads "(1x1),...,(6x6)", columns first, got {text!r}')
    first_cols, first_rows, last_cols, last_rows = map(int, match.groups())
    grids = [
        (rows, cols) for cols in range(first_cols, last_cols + 1) for rows in range(first_rows, last_rows + 1)
    ]
    if not grids or min(first_cols, first_rows) < 1:
        raise ValueError(f"there is no grid of tiles in {text!r}")
    return tuple(grids)


def best_target(size: Size, targets: Sequence[Size]) -> Size:
    """The target that shows most of an image's pixels, and wastes fewest of its own; the first of equal ones.

    Rounded as LLaVA and transformers do, whose products of floats may lie just under a whole number.
    """
    height, width = size

    def merit(target: Size) -> tuple[int, int]:
        scale = min(target[1] / width, target[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - target[0] * target[1]

    return max(targets, key=merit)


def fitted_size(size: Size, target: Size) -> Size:
    """Of an image in a target: one side is the target's, the other follows the aspect, rounded up."""
    down, across = target[0] / size[0], target[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * down), target[1])


def unpadded_cells(size: Size, cells: Size, floor: Floor = "exact") -> Size:
    """Of a map of `cells`, in whose middle an image of `size` lies: the rows and columns that it fills.

    As many are taken off at either end, so that an odd one stays. An image that fills less than one row or
    column may keep none of them.
    """
    if size[1] * cells[0] > size[0] * cells[1]:
        return _middle(size[0], cells[1], size[1], cells[0], floor), cells[1]
    return cells[0], _middle(size[1], cells[0], size[0], cells[1], floor)


def _middle(length: int, cells_across: int, across: int, cells: int, floor: Floor) -> int:
    exact = floor == "exact"
    filled = length * cells_across // across if exact else int(length * (cells_across / across))
    return cells - (cells - filled) // 2 * 2


def limited_cells(cells: Size, most: int) -> Size:
    """The size of a map of about `most` cells in the aspect of `cells`, where these are a fifth more."""
    times = math.sqrt(cells[0] * cells[1] / most)
    return (max(int(cells[0] // times), 1), max(int(cells[1] // times), 1)) if times > 1.1 else cells


@dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """grid: of tiles; target: its pixels, in whose middle the image is of size `content`. kept: the cells in
    the middle of the tiles' map whose tokens are read; cells: the size to which these are brought.
    """

    grid: Size
    target: Size
    content: Size
    kept: Size
    cells: Size

    @property
    def corner(self) -> Size:
        """(top, left) of the image in the target; an odd pixel of padding is at the bottom or the right."""
        return (self.target[0] - self.content[0]) // 2, (self.target[1] - self.content[1]) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyResGeometry(Geometry):
    """Layouts and inputs; inputs and views are the tiles row by row, and the overview behind them. Tokens of
    the overview come first.

    grids: of tiles, one of which an image is fitted to, (rows, columns); without any there is the overview
    alone. framing: of the overview. max_tiles: of so many tiles, about, tokens are left; None is no limit.
    """

    side: int
    stride: int
    framing: Framing
    grids: tuple[Size, ...]
    merge: TileMerging
    max_tiles: int | None
    floor: Floor
    mean: Statistics
    std: Statistics
    region: RegionConfig = CLOSE_UP

    @property
    def overview(self) -> PyramidGeometry:
        return PyramidGeometry(
            names=("overview",),
            sides=(self.side,),
            strides=(self.stride,),
            framing=self.framing,
            mean=self.mean,
            std=self.std,
        )

    @property
    def tile_cells(self) -> Size:
        return (self.side // self.stride, self.side // self.stride)

    def plan(self, size: Size) -> TilePlan | None:
        """Of an image of `size`; None where there are no tiles."""
        if not self.grids:
            return None
        rows, cols = self.tile_cells
        target = best_target(size, [(r * self.side, c * self.side) for r, c in self.grids])
        grid = (target[0] // self.side, target[1] // self.side)
        kept = cells = (grid[0] * rows, grid[1] * cols)
        if self.merge == "spatial_unpad":
            kept = cells = unpadded_cells(size, kept, self.floor)
        if self.max_tiles is not None:
            cells = limited_cells(kept, self.max_tiles * rows * cols)
        return TilePlan(grid=grid, target=target, content=fitted_size(size, target), kept=kept, cells=cells)

    def layout(self, size: Size) -> TokenLayout:
        """size (H, W) of the upright image, both at least 1. Raises ValueError otherwise."""
        return self._layout(size, None)

    def close_up(self, size: Size, region: Region) -> TokenLayout:
        if not self.grids:
            return Geometry.close_up(self, size, region)
        least = self.side / self.region.enlarged(region)
        layout = self._layout(size, cut_around(region, size, self.region, (least, least)))
        return replace(layout, region=region)

    def _layout(self, size: Size, cut: Region | None) -> TokenLayout:
        """cut: what lies on the tiles; None: all of the image."""
        whole = (0, 0, size[1], size[0]) if cut is None else cut
        overview, plan = self.overview.layout(size), self.plan(size_of(whole))
        newline = int(self.merge == "spatial_unpad")
        views, count, grids = list(overview.views), overview.num_visual, [*overview.grids]
        if plan is None:
            count += newline
        else:
            tiles = list(self._tiles(whole, plan))
            grids += self._grids(tiles, plan, first=count)
            views[:0] = tiles
            count += plan.cells[0] * (plan.cells[1] + newline)
        return TokenLayout(
            image_size=size,
            inputs=tuple(view.size for view in views),
            views=tuple(views),
            runs=(TokenRun(count=count),),
            tiles=plan.grid if plan else (0, 0),
            grids=tuple(grids),
            cut=cut,
        )

    def _grids(self, tiles: Sequence[View], plan: TilePlan, *, first: int) -> list[TokenGrid]:
        """Where the tokens behind those of the overview look. Newlines have no place."""
        rows, cols = self.tile_cells
        if self.merge == "flat":
            starts = range(first, first + len(tiles) * rows * cols, rows * cols)
            return [TokenGrid.over(t.box, t.grid, first=n) for t, n in zip(tiles, starts, strict=True)]
        if not all(plan.cells):
            return []
        (left, top, *_), (*_, right, bottom) = tiles[0].box, tiles[-1].box
        rows, cols = plan.grid[0] * rows, plan.grid[1] * cols
        across, down = (right - left) / cols, (bottom - top) / rows  # of a cell
        x = left + (cols - plan.kept[1]) // 2 * across
        y = top + (rows - plan.kept[0]) // 2 * down
        box = (x, y, x + plan.kept[1] * across, y + plan.kept[0] * down)
        step = plan.cells[1] + int(self.merge == "spatial_unpad")
        return [TokenGrid.over(box, plan.cells, first=first, step=step)]

    def inputs(self, image: Image.Image, layout: TokenLayout) -> list[Tensor]:
        (overview,) = self.overview.inputs(image, self.overview.layout(layout.image_size))
        if (plan := self.plan(layout.fine_size)) is None:
            return [overview]
        if layout.cut is not None:
            image = image.crop(layout.cut)
        (height, width), (top, left) = plan.content, plan.corner
        canvas = Image.new("RGB", (plan.target[1], plan.target[0]))  # black
        canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        whole = to_tensor(canvas, plan.target, self.mean, self.std)
        rows = whole.split(self.side, dim=1)
        return [*(tile for row in rows for tile in row.split(self.side, dim=2)), overview]

    def _tiles(self, part: Region, plan: TilePlan) -> Iterator[View]:
        """Of a part of the image; their boxes may reach beyond it, or lie beside it."""
        (height, width), (top, left) = size_of(part), plan.corner
        down, across = height / plan.content[0], width / plan.content[1]
        side = self.side
        for row in range(plan.grid[0]):
            for col in range(plan.grid[1]):
                x, y = (col * side - left) * across, (row * side - top) * down
                box: Box = (x, y, x + side * across, y + side * down)
                name = f"tile {row + 1}.{col + 1}"
                yield View(name=name, size=(side, side), box=moved(box, part), grid=self.tile_cells)
