"""A picture that is far larger than a model's view, cut into overlapping tiles: pure integers.

Sizes are (height, width). A tile lies in two grids: that of the picture, and that of the picture at the scale
at which the model sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stepwell.ops.sliding_windows import Window
from stepwell.structures import Size

__all__ = ["MOST_OVERLAP", "Tile", "Tiles", "scaled_window"]

MOST_OVERLAP = 0.9
"""With which a place is looked at a hundred times already."""


class Tile(NamedTuple):
    """A part of a picture, and what the model sees of it."""

    source: Window  # in the picture
    view: Window  # in the scaled picture; its size is that of the model's input

    @property
    def size(self) -> Size:
        """Of the model's input."""
        return self.view.bottom - self.view.top, self.view.right - self.view.left


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a picture is cut. Raises ValueError for numbers that cannot be."""

    size: int | None = None  # side of a tile in pixels as the model sees it; None: the model's own view
    overlap: float = 0.25  # of a tile with the next, as a share of its side; smaller objects are seen whole
    scale: float = 1.0  # the model's pixels for a pixel of the picture, along each side

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 2):
            raise ValueError(f"a tile's size is a whole number of pixels from 2 on, got {self.size!r}")
        if not 0 < self.overlap <= MOST_OVERLAP:
            raise ValueError(
                f"tiles overlap by a share of their side above 0 and up to {MOST_OVERLAP}, got {self.overlap}"
            )
        if not 0 < self.scale <= 16:
            raise ValueError(f"a picture is scaled by more than 0 and at most 16, got {self.scale}")

    def scaled(self, size: Size) -> Size:
        """(H, W) of a picture as the model sees it."""
        height, width = (max(1, int(side * self.scale + 0.5)) for side in size)
        return height, width

    def cut(self, size: Size, *, side: int) -> list[Tile]:
        """(H, W) of a picture -> tiles that cover it, row by row, the first and the last flush with the
        border and the others evenly between, so that all overlap alike, by what was asked for or more.

        side: of a tile where `self.size` is None. All tiles are alike in size as the model sees them; along a
        side of the picture that is shorter than a tile there is one, as long as that side.
        """
        scaled = self.scaled(size)
        rows, cols = (self._spans(length, self.size or side) for length in scaled)
        views = [Window(top, left, bottom, right) for top, bottom in rows for left, right in cols]
        return [Tile(scaled_window(view, scaled, size), view) for view in views]

    def count(self, size: Size, *, side: int) -> int:
        """How many tiles `cut` makes."""
        rows, cols = (self._steps(length, min(self.size or side, length)) + 1 for length in self.scaled(size))
        return rows * cols

    def _steps(self, length: int, side: int) -> int:
        stride = max(1, int(side * (1 - self.overlap)))
        return -(-(length - side) // stride)

    def _spans(self, length: int, side: int) -> list[tuple[int, int]]:
        """First and one past the last, along one side."""
        side = min(side, length)
        steps = self._steps(length, side)
        starts = [step * (length - side) // steps for step in range(steps + 1)] if steps else [0]
        return [(start, start + side) for start in starts]


def scaled_window(window: Window, size: Size, other: Size) -> Window:
    """A window in a picture of `size` -> the same in one of the `other` size, edges rounded, at least one
    pixel each way. Windows that share an edge still do.
    """
    top, bottom = _span(window.top, window.bottom, size[0], other[0])
    left, right = _span(window.left, window.right, size[1], other[1])
    return Window(top, left, bottom, right)


def _span(first: int, last: int, length: int, other: int) -> tuple[int, int]:
    start, end = ((2 * edge * other + length) // (2 * length) for edge in (first, last))
    return min(start, other - 1), max(end, min(start, other - 1) + 1)
