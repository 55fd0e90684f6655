"""Drawn pages whose answers are known: receipts, documents, tables and forms, with the box and character
edges of every line.

A page is a function of (seed, index) and its settings alone. Text sizes are em sizes in pixels of the page;
answers are in capitals, as the transcriptions of scanned receipts are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stepwell.reader.glyphs import FONTS, HELD_OUT, face, typefaces
from stepwell.reader.layouts import LAYOUTS
from stepwell.reader.page import Line, PageSample
from stepwell.reader.questions import asked_closely, turns_about
from stepwell.reader.scan import scanned
from stepwell.reader.sheet import Sheet
from stepwell.structures import Size

__all__ = ["KINDS", "DrawnPages", "Page", "draw_page"]

KINDS = ("mixed", *LAYOUTS)
LONGEST = 2000  # side of a page, in pixels


class Page(NamedTuple):
    image: Image.Image
    lines: tuple[Line, ...]
    ems: tuple[int, ...]  # of the lines, in pixels
    fields: dict[str, str]  # company, date, address, total: those that the page has


def draw_page(
    seed: int,
    index: int,
    *,
    size: Size,
    text: tuple[int, int],
    kind: str = "mixed",
    fonts: Sequence[str] = FONTS,
    worn: float = 0.5,
) -> Page:
    """Page `index` of the endless book `seed`.

    size = (H, W) in pixels; text = smallest and largest em in pixels; kind: one of `KINDS`; fonts: names or
    files of typefaces; worn: the share of pages that are skewed, faint, noisy or compressed. Raises
    ValueError for an unknown kind or typeface, and a page too small for its text or too large.
    """
    if kind not in KINDS:
        raise ValueError(_unknown(kind))
    if not 4 <= text[0] <= text[1] or min(size) < 2 * text[1]:
        raise ValueError(f"text of {text[0]}..{text[1]} px does not fit a page of {size[0]}x{size[1]}")
    if max(size) > LONGEST:
        raise ValueError(f"pages are drawn up to {LONGEST} px long, got {size[0]}x{size[1]}")
    chance = random.Random(f"{seed}/{index}")
    if kind == "mixed":
        kind = chance.choices(list(LAYOUTS), [often for often, _ in LAYOUTS.values()])[0]
    em = round(text[0] * (text[1] / text[0]) ** chance.random())
    sheet = Sheet(
        ink=np.zeros(size, dtype=np.uint8),
        chance=chance,
        face=face(chance.choice(fonts), em),
        typefaces=fonts,
        text=text,
        margin=round(size[1] * chance.uniform(0.01, 0.08)),
        spacing=chance.choice((0, 0, 0, 1)),
    )
    sheet.top = round(size[0] * chance.uniform(0.0, 0.04))
    _, fill = LAYOUTS[kind]
    fields = fill(sheet)
    image, placed = scanned(sheet.ink, sheet.lines, chance, worn=worn)
    known = [
        (replace(line, text=line.text.upper()), em)
        for line, em in zip(placed, sheet.ems, strict=True)
        if line is not None and len(line.text.upper()) == len(line.text)
    ]
    printed = " ".join(line.text for line, _ in known)
    fields = {name: value.upper() for name, value in fields.items() if value.upper() in printed}
    return Page(image, tuple(line for line, _ in known), tuple(em for _, em in known), fields)


def _unknown(kind: str) -> str:
    return f"unknown kind of page {kind!r}; choose {', '.join(KINDS[:-1])} or {KINDS[-1]}"


class DrawnPages:
    """A source of `count` drawn pages, asked for `reads` lines each and for every key field they have."""

    def __init__(
        self,
        *,
        count: int,
        seed: int = 0,
        sides: tuple[int, int] = (320, 320),
        aspect: tuple[float, float] = (1.0, 1.0),
        text: tuple[int, int] = (12, 28),
        reads: int = 16,
        close: float = 0.0,
        page: str = "mixed",
        fonts: Path | None = None,
        worn: float = 0.5,
        held_out: bool = False,
    ) -> None:
        """sides: smallest and largest long side in pixels; aspect: smallest and largest height / width;
        close: share of pages of which one line is looked at closely, and nothing else is asked; fonts: a
        folder whose typefaces are used beside those that are always there; worn: as of `draw_page`;
        held_out: also the typefaces that training never sees. Raises ValueError for ranges that are none.
        """
        for name, (least, most) in {"sides": sides, "aspect": aspect, "text": text}.items():
            if not 0 < least <= most < math.inf:
                raise ValueError(f"{name} are the least and the most, got {least} and {most}")
        if sides[1] > LONGEST:
            raise ValueError(f"pages are drawn up to {LONGEST} px long, got {sides[1]}")
        shortest = sides[0] / max(aspect[1], 1 / aspect[0])
        if shortest < 2 * text[1]:
            raise ValueError(f"text of {text[1]} px does not fit a page that is {shortest:.0f} px across")
        if page not in KINDS:
            raise ValueError(_unknown(page))
        self.count, self.seed, self.sides, self.aspect = count, seed, sides, aspect
        self.text, self.reads, self.close, self.page, self.worn = text, reads, close, page, worn
        self.fonts = (*FONTS, *(HELD_OUT if held_out else ()), *(typefaces(fonts) if fonts else ()))

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return f"drawn page {index} of seed {self.seed}"

    def drawn(self, index: int) -> Page:
        """A page, at the place of an index."""
        if not 0 <= index < self.count:
            raise IndexError(f"page {index} of {self.count}")
        chance = random.Random(f"{self.seed}/{index}/size")
        long_side = chance.randint(*self.sides)
        ratio = self.aspect[0] * (self.aspect[1] / self.aspect[0]) ** chance.random()
        size = (long_side, round(long_side / ratio)) if ratio >= 1 else (round(long_side * ratio), long_side)
        return draw_page(
            self.seed,
            index,
            size=size,
            text=self.text,
            kind=self.page,
            fonts=self.fonts,
            worn=self.worn,
        )

    def __getitem__(self, index: int) -> PageSample:
        page = self.drawn(index)
        chance = random.Random(f"{self.seed}/{index}/questions")
        size = (page.image.height, page.image.width)
        if page.lines and chance.random() < self.close:
            line = chance.choice(page.lines)
            messages, region = asked_closely(line, size, chance)
            return PageSample(
                images=(page.image,), messages=messages, regions=(region,), spelled=(line,), lines=page.lines
            )
        messages, spelled = turns_about(page.lines, page.fields, size, reads=self.reads, chance=chance)
        return PageSample(images=(page.image,), messages=messages, spelled=spelled, lines=page.lines)
