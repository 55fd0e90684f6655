"""The same image at several sizes, one for each branch; one branch gives LLaVA-1.5's single view.

PIIP, arXiv 2501.07783, section III-A: large views go to small networks, and the smaller views are made from
the largest. Framing "aspect" (new models) keeps the image's shape without padding: side j is a whole number k
of steps u_j; the steps have the ratios of the sides exactly and divide by the strides, so that every branch
shows exactly the same shape. "pad", "crop" and "squeeze" are as published: square views, sides rounded down
to whole pixels. Sizes are (height, width) in pixels; sides, strides and statistics have one entry per branch
or per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.structures import (
    Box,
    FeatureMap,
    Geometry,
    Region,
    Size,
    Statistics,
    TokenGrid,
    TokenLayout,
    TokenRun,
    View,
)
from stepwell.views.preprocess import square_box, squared, to_tensor
from stepwell.views.region import CLOSE_UP, RegionConfig, cut_around, moved, size_of, whole_cells

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Framing", "PyramidGeometry", "exact_ratio", "image_pyramid", "pyramid_sizes", "scaled_size"]

Framing = Literal["aspect", "pad", "crop", "squeeze"]
"""How an image meets its views: its aspect kept; padded to a square; short side resized, the middle cut out;
both sides resized to those of a square.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PyramidGeometry(Geometry):
    """Layouts and inputs of a pyramid whose tokens lie on one grid. The input is the last view, the largest;
    of a close-up the largest view of the whole, and the last view, which shows the cut.

    framing "aspect": `sides` are long sides, the short one has at least `min_cells` cells in every branch.
    Otherwise smaller views are floor(side * ratio) pixels. grid: of the tokens where it is fixed; None
    means that of the view `grid_view`, by default the last. align_corners: as of `image_pyramid`, for views
    that are made to a size.
    """

    names: tuple[str, ...]
    sides: tuple[int, ...]
    strides: tuple[int, ...]
    framing: Framing
    mean: Statistics
    std: Statistics
    min_cells: int = 1
    grid: Size | None = None
    grid_view: int = -1
    align_corners: bool = False
    region: RegionConfig = CLOSE_UP

    def __post_init__(self) -> None:
        self.layout((1, 1))  # sides, strides and windows that fit no image are refused here

    @property
    def ratios(self) -> tuple[float, ...]:
        """Side of each view relative to the last, as the views are made from the input."""
        ratio = exact_ratio if self.framing == "aspect" or self.align_corners else truediv
        return tuple(ratio(side, self.sides[-1]) for side in self.sides)

    @property
    def close_up_ratios(self) -> tuple[float, ...]:
        """As `ratios`, in a close-up: to the largest view of the whole, and 1 for the view of the cut."""
        return (*(exact_ratio(side, self.sides[-2]) for side in self.sides[:-1]), 1.0)

    def layout(self, size: Size) -> TokenLayout:
        """size (H, W) of the upright image, both at least 1. Raises ValueError otherwise."""
        if min(size) < 1:
            raise ValueError(f"an image needs at least one pixel each way, got {size[0]}x{size[1]}")
        sizes, box = self._sizes(size), _box(size, self.framing)
        views = self._views(sizes, [box] * len(sizes))
        runs, grids = self._tokens(views)
        return TokenLayout(image_size=size, inputs=(sizes[-1],), views=views, runs=runs, grids=grids)

    def close_up(self, size: Size, region: Region) -> TokenLayout:
        if len(self.sides) < 2:
            return Geometry.close_up(self, size, region)
        side, stride = self.sides[-1], self.strides[-1]
        if self.framing == "aspect":
            sizes = self._sizes(size)[:-1]
            cut, fine = whole_cells(
                region, size, self.region, side=side, stride=stride, min_cells=self.min_cells
            )
        else:
            sizes, fine = tuple((length, length) for length in self.sides[:-1]), (side, side)
            cut = cut_around(region, size, self.region, (side / self.region.enlarged(region),) * 2)
        box = moved(_box(size_of(cut), self._cut_framing), cut)
        views = self._views([*sizes, fine], [*[_box(size, self.framing)] * len(sizes), box])
        runs, grids = self._tokens(views)
        return TokenLayout(
            image_size=size,
            inputs=(sizes[-1], fine),
            views=views,
            runs=runs,
            grids=grids,
            region=region,
            cut=cut,
        )

    @property
    def _cut_framing(self) -> Framing:
        """Of a cut: nothing of it is left out."""
        return "pad" if self.framing == "crop" else self.framing

    def _views(self, sizes: Sequence[Size], boxes: Sequence[Box]) -> tuple[View, ...]:
        return tuple(
            View(name=name, size=size, box=box, grid=(size[0] // stride, size[1] // stride))
            for name, size, box, stride in zip(self.names, sizes, boxes, self.strides, strict=True)
        )

    def _tokens(self, views: Sequence[View]) -> tuple[tuple[TokenRun], tuple[TokenGrid]]:
        view = views[self.grid_view]
        rows, cols = size = self.grid or view.grid
        return (TokenRun(count=rows * cols),), (TokenGrid.over(view.box, size),)

    def inputs(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        whole, *fine = layout.inputs
        inputs = [self._input(image, whole, self.framing)]
        if layout.cut is not None:
            inputs.append(self._input(image.crop(layout.cut), fine[0], self._cut_framing))
        return inputs

    def _input(self, image: Image, size: Size, framing: Framing) -> Tensor:
        if framing != "aspect":
            image = squared(image, framing, size[0], self.mean)
        return to_tensor(image, size, self.mean, self.std)

    def views(self, inputs: Sequence[Tensor], layout: TokenLayout) -> list[Tensor]:
        return [view[0] for view in self.pyramid(*(image[None] for image in inputs))]

    def pyramid(self, image: Tensor, fine: Tensor | None = None) -> list[Tensor]:
        """The views (B, 3, h, w) of an input (B, 3, H, W); fine: of a close-up, the view of the cut."""
        ratios = self.ratios if fine is None else self.close_up_ratios[:-1]
        views = image_pyramid(image, ratios, align_corners=self.align_corners)
        return views if fine is None else [*views, fine]

    def by_image(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[tuple[Tensor, ...]]:
        """The inputs (3, h, w) of all images -> those of each, and of a close-up where its last view lies in
        the others (4,), in fractions of what they show.
        """
        given = iter(inputs)
        images = []
        for layout in layouts:
            tensors = [next(given) for _ in layout.inputs]
            if layout.cut is not None:
                place = _place(layout.views[-1].box, layout.views[0].box)
                tensors.append(torch.tensor(place, device=tensors[0].device))
            images.append(tuple(tensors))
        return images

    def feature_maps(self, maps: Sequence[Tensor], layout: TokenLayout) -> tuple[FeatureMap, ...]:
        """One map (C, h, w) a view, with its stride."""
        ratios = self.ratios if layout.cut is None else self.close_up_ratios
        strides = [stride / ratio for stride, ratio in zip(self.strides, ratios, strict=True)]
        return tuple(map(FeatureMap, maps, layout.views, strides))

    def _sizes(self, size: Size) -> tuple[Size, ...]:
        if self.framing == "aspect":
            return pyramid_sizes(size, sides=self.sides, strides=self.strides, min_cells=self.min_cells)
        largest = (self.sides[-1], self.sides[-1])
        return tuple(scaled_size(largest, ratio) for ratio in self.ratios)


def _place(box: Box, frame: Box) -> Box:
    """Where a box lies in a frame, in fractions of that."""
    left, top, right, bottom = frame
    width, height = right - left, bottom - top
    return (box[0] - left) / width, (box[1] - top) / height, (box[2] - left) / width, (box[3] - top) / height


def _box(size: Size, framing: Framing) -> Box:
    return square_box(size, "squeeze" if framing == "aspect" else framing)


def pyramid_sizes(
    size: Size, *, sides: Sequence[int], strides: Sequence[int], min_cells: int = 1
) -> tuple[Size, ...]:
    """Sizes of one image in all branches: its long side becomes `sides`, its short side follows its aspect.

    size: of the image. sides, strides: of each branch. The short side has at least `min_cells` cells of a
    stride in every branch; where the aspect cannot be kept because of that, it is bent.
    Raises ValueError if a side does not divide by its stride, or if no image but a square one would fit.
    """
    steps = _steps(sides, strides)
    most = sides[0] // steps[0]
    least = max(-(-min_cells * stride // step) for stride, step in zip(strides, steps, strict=True))
    if least > most:
        raise ValueError(f"{min_cells} cells of strides {list(strides)} do not fit into sides {list(sides)}")
    long, short = max(size), min(size)
    if short < 1:
        raise ValueError(f"an image needs at least one pixel each way, got {size[0]}x{size[1]}")
    nearest = (2 * most * short + long) // (2 * long)
    across = min(max(nearest, least), most)
    height, width = (most if side == long else across for side in size)
    return tuple((height * step, width * step) for step in steps)


def _steps(sides: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The smallest steps, one a branch, in the exact ratios of the sides, each divisible by its stride."""
    if len(sides) != len(strides) or not sides or min(*sides, *strides) < 1:
        raise ValueError(f"need one side and one stride a branch, got {list(sides)} and {list(strides)}")
    for side, stride in zip(sides, strides, strict=True):
        if side % stride:
            raise ValueError(
                f"a side of {side} does not divide by stride {stride}; take {side - side % stride}"
            )
    common = math.gcd(*sides)
    parts = [side // common for side in sides]
    times = math.lcm(*(stride // math.gcd(stride, part) for part, stride in zip(parts, strides, strict=True)))
    if common < 2 * times:
        raise ValueError(
            f"sides {list(sides)} share no step that divides by strides {list(strides)}, so every image "
            f"would become a square; choose sides with a larger common divisor than {common}"
        )
    return [part * times for part in parts]


def exact_ratio(side: int, largest: int) -> float:
    """side / largest, as the first float not below it: rounding down then loses no pixel of an exact size."""
    ratio = side / largest
    numerator, denominator = ratio.as_integer_ratio()
    return ratio if numerator * largest >= side * denominator else math.nextafter(ratio, math.inf)


def scaled_size(size: Size, ratio: float) -> Size:
    """The size that `image_pyramid` gives an image of `size`: each side times the ratio, rounded down."""
    return math.floor(size[0] * ratio), math.floor(size[1] * ratio)


def image_pyramid(image: Tensor, ratios: Sequence[float], *, align_corners: bool = False) -> list[Tensor]:
    """(B, 3, H, W) -> one (B, 3, floor(H * ratio), floor(W * ratio)) a branch; the image itself for ratio 1.

    Bilinear, no antialiasing. The ratio, not the size, is handed to torch, which then maps pixels by it even
    where a side was rounded down: so does PIIP's official code. align_corners: the outermost pixels fall on
    each other instead, as in LLaVA-HR's, and the sizes alone count.
    """
    return [image if ratio == 1 else _rescale(image, ratio, align_corners) for ratio in ratios]


def _rescale(image: Tensor, ratio: float, align_corners: bool) -> Tensor:
    if min(scaled_size((image.shape[-2], image.shape[-1]), ratio)) < 1:
        raise ValueError(f"nothing is left of {image.shape[-2]}x{image.shape[-1]} pixels at ratio {ratio:g}")
    return F.interpolate(image, scale_factor=ratio, mode="bilinear", align_corners=align_corners)
