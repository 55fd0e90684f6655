"""What a data source yields: a picture, a conversation about it, and what else is known of its text.

A source is anything with a length and an index; nothing else is asked of it (`Source`). Boxes are xyxy in
pixels of the sample's picture. The same index gives the same sample for the life of a source, so that a run
can resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stepwell.structures import Box

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Line", "Sample", "Source", "Turn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of text in a picture.

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
class Turn:
    """A question and its answer; `line` is the line that the answer spells, where it spells one."""

    question: str
    answer: str
    line: Line | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A picture (or the path of one; None for text alone) and the turns about it.

    The first question holds the `<image>` placeholder if there is a picture. `lines` are all lines known.
    """

    image: Image | Path | None
    turns: tuple[Turn, ...]
    lines: tuple[Line, ...] = ()


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError past the end, and stepwell.ImageError or OSError for a picture that cannot be
        read.
        """
        ...
