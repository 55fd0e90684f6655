"""Windows of one size that cover an image: pure integers."""

from __future__ import annotations

from typing import NamedTuple

from stepwell.structures import Size

__all__ = ["Window", "windows"]


class Window(NamedTuple):
    """Rows top to bottom and columns left to right of an image, the last ones left out."""

    top: int
    left: int
    bottom: int
    right: int


def windows(size: Size, crop: Size, stride: Size) -> list[Window]:
    """Row by row. The last window of a row or a column ends at the border; for a side below the crop there
    is one, as long as the side. Raises ValueError for a stride that leaves gaps.
    """
    if not all(0 < step <= side for step, side in zip(stride, crop, strict=True)):
        raise ValueError(f"windows of {crop} move by 1 to as many pixels, got a stride of {stride}")
    rows, cols = map(_spans, size, crop, stride)
    return [Window(top, left, bottom, right) for top, bottom in rows for left, right in cols]


def _spans(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """First and one past the last, along one side."""
    crop = min(crop, length)
    last = length - crop
    return [(min(first, last), min(first, last) + crop) for first in range(0, last + stride, stride)]
