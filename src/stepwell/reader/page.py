"""A page for a small reader: an image whose lines of text are known, and questions that point to them.

Boxes are xyxy in pixels of the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepwell.data.sample import Sample
from stepwell.structures import Box

__all__ = ["Line", "PageSample"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of text.

    `edges` are the left edges of the characters and the right edge of the last, in pixels: len(text) + 1
    numbers. slope: pixels that the line falls for every pixel to the right; the box holds all of it.
    """

    text: str
    box: Box
    edges: tuple[float, ...]
    exact: bool = True  # False where the edges are only spread evenly over the box
    slope: float = 0.0

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.text) + 1:
            raise ValueError(
                f"{len(self.text)} characters need {len(self.text) + 1} edges, got {len(self.edges)}"
            )

    @property
    def height(self) -> float:
        """Of the ink, across the line."""
        left, top, right, bottom = self.box
        return bottom - top - abs(self.slope) * (right - left)

    def middle(self, x: float) -> float:
        """The row half-way up the ink, at column x."""
        left, top, right, bottom = self.box
        return (top + bottom) / 2 + self.slope * (x - (left + right) / 2)

    def shifted(self, x: float, y: float) -> Line:
        """The line, so many pixels further right and down."""
        left, top, right, bottom = self.box
        return replace(
            self,
            box=(left + x, top + y, right + x, bottom + y),
            edges=tuple(edge + x for edge in self.edges),
        )

    def part(self, text: str) -> Line | None:
        """The first stretch of the line that reads `text`, as a line of its own; None if there is none."""
        start = self.text.find(text)
        if start < 0 or not text:
            return None
        edges = self.edges[start : start + len(text) + 1]
        left, right = edges[0], edges[-1]
        middle = self.middle((left + right) / 2)
        half = (self.height + abs(self.slope) * (right - left)) / 2
        box = (left, middle - half, right, middle + half)
        return Line(text=text, box=box, edges=edges, exact=self.exact, slope=self.slope)


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSample(Sample):
    """`spelled` holds the line that each answer spells, where it spells one; `lines` all that are known."""

    spelled: tuple[Line | None, ...] = ()
    lines: tuple[Line, ...] = ()
