"""A page for a small reader: an image whose lines of text are known, and questions that point to them.

Boxes are xyxy in pixels of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.sample import Sample
from stepwell.structures import Box

__all__ = ["Line", "PageSample"]


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
class PageSample(Sample):
    """`spelled` holds the line that each answer spells, where it spells one; `lines` all that are known."""

    spelled: tuple[Line | None, ...] = ()
    lines: tuple[Line, ...] = ()
