"""A page while it is filled from the top: ink, what was written where, and the next free row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stepwell.reader.glyphs import Face, face
from stepwell.reader.page import Line

__all__ = ["Sheet"]


@dataclass(kw_only=True)
class Sheet:
    """ink: coverage (H, W), from 0 to 255. typefaces: names that `face` knows, of which others may be chosen.
    text: smallest and largest em, in pixels.
    """

    ink: NDArray[np.uint8]
    chance: random.Random
    face: Face
    typefaces: Sequence[str]
    text: tuple[int, int]
    margin: int
    spacing: int = 0
    top: int = 0
    lines: list[Line] = field(default_factory=list)
    ems: list[int] = field(default_factory=list)  # of the lines

    @property
    def width(self) -> int:
        """Between the margins."""
        return int(self.ink.shape[1]) - 2 * self.margin

    @property
    def bottom(self) -> int:
        """The last row that may be written on, and one."""
        return int(self.ink.shape[0]) - self.margin

    @property
    def full(self) -> bool:
        return self.top + self.face.line_height > self.bottom

    def other(self, size: float | None = None) -> Face:
        """Another typeface, as large as told, at most as large as the page's largest text."""
        em = self.face.size if size is None else round(min(max(size, self.text[0]), self.text[1]))
        return face(self.chance.choice(self.typefaces), em)

    def scaled(self, times: float) -> Face:
        """The page's typeface, so many times larger, at most as large as the page's largest text."""
        return face(self.face.name, round(min(self.face.size * times, self.text[1])))

    def row(self, *texts: str, align: str = "left", face: Face | None = None) -> list[str]:
        """Writes the texts in one row: one of them aligned, several spread from the left to the right margin.

        Returns what was written of each; a text too long for its part of the row is cut.
        """
        if self.full:
            return []
        part = self.width // len(texts)
        sides = [align] if len(texts) == 1 else ["left", *["right"] * (len(texts) - 1)]
        cells = [
            (self.margin + i * part, part, text, side)
            for i, (text, side) in enumerate(zip(texts, sides, strict=True))
        ]
        return self.cells(cells, face)

    def cells(self, cells: Sequence[tuple[int, int, str, str]], face: Face | None = None) -> list[str]:
        """Writes texts in one row, each (left, width, text, align). Returns what was written of each."""
        if self.full:
            return []
        face = face or self.face
        written = [
            line.text
            for left, width, text, align in cells
            if (line := self.put(left, width, text, align, face))
        ]
        self.top += round(face.line_height * self.chance.uniform(0.9, 1.35))
        return written

    def put(self, left: int, width: int, text: str, align: str, face: Face) -> Line | None:
        """A text within so many pixels, as much of it as fits; the next row stays where it is."""
        text = self._fit(text, face, width)
        free = width - face.width(text, self.spacing)
        shift = {"left": 0, "center": free // 2, "right": free}[align]
        line = face.draw(self.ink, left + max(shift, 0), self.top, text, self.spacing)
        if line is not None:
            self.lines.append(line)
            self.ems.append(face.size)
        return line

    def skip(self, share: float) -> None:
        """So many rows."""
        self.top += round(self.face.line_height * share)

    def rule(self) -> None:
        """A row of hyphens or a thin stroke, not counted as text."""
        if self.full:
            return
        at = self.top + self.face.line_height // 2
        step = self.chance.choice((1, 1, self.face.size // 2 + 2))
        self.ink[at : at + self.chance.randint(1, 2), self.margin : self.margin + self.width : step] = 255
        self.skip(1.0)

    def stroke(self, left: int, top: int, right: int, bottom: int) -> None:
        """A filled bar, at least a pixel wide and high, cut off at the page's edge."""
        self.ink[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)] = 255

    def _fit(self, text: str, face: Face, width: int) -> str:
        while len(text) > 1 and face.width(text, self.spacing) > width:
            text = text[: len(text) - max(1, len(text) // 8)].rstrip()
        return text
