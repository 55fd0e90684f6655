"""A page for a small reader: an image whose lines of text are known, and questions that point to them.

Boxes are xyxy in pixels of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.sample import Sample, Turn
from stepwell.structures import Box

__all__ = ["Line", "PageSample", "PageTurn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of text.

    `edges` are the left edges of the characters and the right edge of the last, in pixels: len(text) + 1
    numbers.
    """

    text: str
    box: Box
    edges: tuple[float, ...]
    exact: bool = True  # False where the edges are only spread evenly over the box

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.text) + 1:
            raise ValueError(
                f"{len(self.text)} characters need {len(self.text) + 1} edges, got {len(self.edges)}"
            )

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    def part(self, text: str) -> Line | None:
        """The first stretch of the line that reads `text`, as a line of its own; None if there is none."""
        start = self.text.find(text)
        if start < 0 or not text:
            return None
        edges = self.edges[start : start + len(text) + 1]
        box = (edges[0], self.box[1], edges[-1], self.box[3])
        return Line(text=text, box=box, edges=edges, exact=self.exact)


@dataclass(frozen=True, kw_only=True, slots=True)
class PageTurn(Turn):
    """`line` is the line that the answer spells, where it spells one."""

    line: Line | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSample(Sample):
    """`lines` are all lines of the page that are known."""

    lines: tuple[Line, ...] = ()
