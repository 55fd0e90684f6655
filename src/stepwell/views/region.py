"""A part of an image that is looked at closely: what is cut out for it.

People say where to look in pixels of the upright image, or in fractions of its sides. Of a system with
several views the finest are then made from a cut around that region, and the others still show the whole.
Sizes are (height, width), boxes (left, top, right, bottom).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from stepwell.structures import Box, Region, Size

__all__ = [
    "CLOSE_UP",
    "RegionConfig",
    "cut_around",
    "moved",
    "region_edges",
    "region_in_pixels",
    "region_in_words",
    "region_of_fractions",
    "regions_beside",
    "size_of",
    "whole_cells",
]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RegionConfig:
    """margin: what is seen beside a region, on each side, by its shorter side. enlarge: pixels of a view that
    a pixel of the image becomes at most, or as many as where the whole of a small image is enlarged; where a
    region is smaller than a view can be, more is cut out around it, as far as the image goes. short_side: a
    region is enlarged until its shorter side has so many pixels in the view, and no further; None: any.
    grain: cells that the longer side of a view of an aspect of its own is a multiple of, where the image goes
    so far: views of few sizes share kernels, and go through a network together.
    """

    margin: Annotated[float, Field(ge=0)] = 0.25
    enlarge: Annotated[float, Field(gt=0)] = 1.0
    short_side: Annotated[int, Field(gt=0)] | None = None
    grain: Annotated[int, Field(gt=0)] = 1

    def enlarged(self, region: Region, most: float = 0.0) -> float:
        """Pixels of a view that a pixel of a region becomes at most; most: where more than `enlarge` is
        allowed.
        """
        most = max(self.enlarge, most)
        if self.short_side is None:
            return most
        return min(most, max(1.0, self.short_side / min(size_of(region))))


CLOSE_UP = RegionConfig()


def region_in_pixels(region: Sequence[float], size: Size) -> Region:
    """The whole pixels that a region covers in an image of `size`, what lies outside left out.

    Raises ValueError of one line for what is no region, or lies outside.
    """
    left, top, right, bottom = edges = region_edges(region)
    if max(right, bottom) <= 1 and any(edge % 1 for edge in edges):
        raise ValueError(f"a region is told in pixels here, got {_text(region)}, which seem to be fractions")
    height, width = size
    pixels = (
        max(math.floor(left), 0),
        max(math.floor(top), 0),
        min(math.ceil(right), width),
        min(math.ceil(bottom), height),
    )
    if pixels[0] >= pixels[2] or pixels[1] >= pixels[3]:
        raise ValueError(f"region {_text(region)} lies outside the image, which is {width} x {height} pixels")
    return pixels


def region_of_fractions(region: Sequence[float], size: Size) -> Region:
    """As `region_in_pixels`, of a region in fractions of the image's width and height."""
    edges = region_edges(region)
    if not all(0 <= edge <= 1 for edge in edges):
        raise ValueError(
            f"a region is told in fractions of the image's sides, from 0 to 1, got {_text(region)}"
        )
    height, width = size
    # A product may lie just beside the whole number that is meant.
    sides = (width, height, width, height)
    left, top, right, bottom = (round(edge * side, 6) for edge, side in zip(edges, sides, strict=True))
    x, y = min(math.floor(left), width - 1), min(math.floor(top), height - 1)
    return x, y, max(math.ceil(right), x + 1), max(math.ceil(bottom), y + 1)


_FRACTION = r"\s*([01](?:\.\d+)?|\.\d+)\s*"
_IN_WORDS = re.compile(r"\[" + ",".join([_FRACTION] * 4) + r"\]")


def region_in_words(text: str) -> Box | None:
    """The one box that a text tells, as in "[0.037, 0.376, 0.223, 0.405]", in fractions of an image's sides;
    None where there is none, or several, or where it is no region.
    """
    boxes = _IN_WORDS.findall(text)
    if len(boxes) != 1:
        return None
    left, top, right, bottom = map(float, boxes[0])
    return (left, top, right, bottom) if left < right <= 1 and top < bottom <= 1 else None


def regions_beside(value: Any, count: int) -> list[Box | None]:
    """What a line of JSON has beside its images as their `region` -> one an image, or None. Of several images
    it is a list. Raises ValueError for another number, and for what is no region.
    """
    if value is None or not count:  # what has no image may call something else so
        return [None] * count
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    regions = value if is_list and not any(isinstance(part, int | float) for part in value) else [value]
    if len(regions) != count:
        stand = "region stands" if len(regions) == 1 else "regions stand"
        raise ValueError(f"{len(regions)} {stand} beside {count} images; null is none")
    return [None if region is None else region_edges(region) for region in regions]


def region_edges(region: Sequence[float]) -> Box:
    """A region as four numbers. Raises ValueError of one line for what is none."""
    form = "a region is (left, top, right, bottom)"
    try:
        edges: Iterable[float] = () if isinstance(region, str | Mapping) else region
        left, top, right, bottom = map(float, edges)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{form}, got {_text(region)}") from None
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"{form} in numbers, got {_text(region)}")
    if left >= right or top >= bottom:
        raise ValueError(f"{form} with left < right and top < bottom, got {_text(region)}")
    return left, top, right, bottom


def _text(region: object) -> str:
    return repr(tuple(region) if isinstance(region, list) else region)


def cut_around(region: Region, size: Size, config: RegionConfig, least: tuple[float, float]) -> Region:
    """What is cut out of an image of `size`: the region with its margin, and at least so high and wide, moved
    or cut off where the image ends.
    """
    left, top, right, bottom = region
    margin = math.ceil(config.margin * min(right - left, bottom - top))
    (y, y_end), (x, x_end) = (
        _span(first, last, margin, math.ceil(wanted), side)
        for first, last, wanted, side in zip((top, left), (bottom, right), least, size, strict=True)
    )
    return x, y, x_end, y_end


def _span(first: int, last: int, margin: int, wanted: int, side: int) -> tuple[int, int]:
    length = min(max(last - first + 2 * margin, wanted), side)
    start = min(max((first + last - length) // 2, 0), side - length)
    return start, start + length


def whole_cells(
    region: Region, size: Size, config: RegionConfig, *, side: int, stride: int, min_cells: int
) -> tuple[Region, Size]:
    """The cut for a view of at most `side` pixels each way, and the size of that view: as much more is cut
    out that it has whole cells of `stride`, `min_cells` at least, and keeps the aspect.
    """
    cut = cut_around(region, size, config, (1, 1))
    # Where the whole image would be enlarged more, so is a part of it.
    scale = min(side / max(size_of(cut)), config.enlarged(region, side / max(size)))
    most = side // stride
    cells = [min(max(math.ceil(length * scale / stride), min_cells), most) for length in size_of(cut)]
    longer = cells.index(max(cells))
    cells[longer] = min(math.ceil(cells[longer] / config.grain) * config.grain, most)
    cut = cut_around(region, size, config, (cells[0] * stride / scale, cells[1] * stride / scale))
    height, width = (
        min(max(round(length * scale / stride), min_cells), most) * stride for length in size_of(cut)
    )
    return cut, (height, width)


def size_of(region: Region) -> Size:
    """(height, width)."""
    left, top, right, bottom = region
    return bottom - top, right - left


def moved(box: Box, cut: Region) -> Box:
    """A box in the pixels of a cut -> the same in those of the image."""
    left, top, right, bottom = box
    return left + cut[0], top + cut[1], right + cut[0], bottom + cut[1]
