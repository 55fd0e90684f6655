"""What pyramid systems show their encoders: one picture at one or several sizes, framed in one of three
ways.

PIIP, arXiv 2501.07783, section III-A: the last branch sees the largest view. One branch gives LLaVA-1.5's
single view. Sizes are (H, W); sides, strides and statistics have one entry per branch or per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import truediv

from PIL.Image import Image
from torch import Tensor

from stepwell.encoders.encoder import Statistics
from stepwell.structures import Box, Size, TokenLayout, TokenRun, View
from stepwell.views.preprocess import pad_and_resize, resize_short_side_and_crop, to_tensor
from stepwell.views.pyramid import exact_ratio, pyramid_sizes, scaled_size

__all__ = ["PyramidGeometry"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PyramidGeometry:
    """Layouts and inputs of a pyramid whose tokens lie on one grid.

    framing "aspect": the picture's aspect is kept, `sides` are long sides, every view divides by its
    stride. "pad", "crop": square views as published; smaller views are floor(side * ratio) pixels. `grid`
    is the token grid where it is fixed; None means the last branch's grid.
    """

    names: tuple[str, ...]
    sides: tuple[int, ...]
    strides: tuple[int, ...]
    framing: str
    mean: Statistics
    std: Statistics
    min_cells: int = 1
    grid: Size | None = None

    def __post_init__(self) -> None:
        self.layout((1, 1))  # sides, strides and windows that fit no picture are refused here

    @property
    def ratios(self) -> tuple[float, ...]:
        """Side of each view relative to the last, as the views are made from the input."""
        ratio = exact_ratio if self.framing == "aspect" else truediv
        return tuple(ratio(side, self.sides[-1]) for side in self.sides)

    def layout(self, size: Size) -> TokenLayout:
        """size (H, W) of the upright picture, both at least 1. Raises ValueError otherwise."""
        if min(size) < 1:
            raise ValueError(f"a picture needs at least one pixel each way, got {size[0]}x{size[1]}")
        sizes = self._sizes(size)
        box = self._box(size)
        views = tuple(
            View(name=name, size=view, box=box, grid=(view[0] // stride, view[1] // stride))
            for name, view, stride in zip(self.names, sizes, self.strides, strict=True)
        )
        rows, cols = self.grid or views[-1].grid
        return TokenLayout(
            image_size=size, inputs=(sizes[-1],), views=views, runs=(TokenRun(count=rows * cols),)
        )

    def views(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        """-> [(3, H, W)], the largest view; the network makes the smaller ones from it."""
        (size,) = layout.inputs
        if self.framing == "pad":
            red, green, blue = (int(255 * channel) for channel in self.mean)
            image = pad_and_resize(image, (red, green, blue), size[0])
        elif self.framing == "crop":
            image = resize_short_side_and_crop(image, size[0])
        return [to_tensor(image, size, self.mean, self.std)]

    def _sizes(self, size: Size) -> tuple[Size, ...]:
        if self.framing == "aspect":
            return pyramid_sizes(size, sides=self.sides, strides=self.strides, min_cells=self.min_cells)
        largest = (self.sides[-1], self.sides[-1])
        return tuple(scaled_size(largest, ratio) for ratio in self.ratios)

    def _box(self, size: Size) -> Box:
        height, width = size
        if self.framing == "aspect":
            return (0.0, 0.0, float(width), float(height))
        side = max(size) if self.framing == "pad" else min(size)
        left, top = float((width - side) // 2), float((height - side) // 2)
        if self.framing == "pad":  # the canvas, its offset rounded as the pasting rounds it
            left, top = -float((side - width) // 2), -float((side - height) // 2)
        return (left, top, left + side, top + side)
