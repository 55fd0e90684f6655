"""Lines cut out of scanned pages and set side by side on a sheet: many lines, and of all pages, in one image.

A page shows lines of one printer, at one size, on much white. A sheet of the same cost shows several times as
many, so that encoders learn to read from few images.
"""

from __future__ import annotations

import random
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stepwell.folders import one_line
from stepwell.images.limits import ImageLimits
from stepwell.images.open import open_image
from stepwell.reader.page import Line, PageSample
from stepwell.reader.questions import asked_closely, fractions_of, turns_about
from stepwell.reader.text_lines import TextLines, even_line

__all__ = ["CutLines"]

_SHEETS = 1_000_000
_KEPT_HEIGHT = 64  # pixels of a line, kept in memory at most
_ROOM = 0.12  # what is cut out beside a line, by its height
_TRIES = 10  # lines that are looked at for the rest of a row
_PAGES_TRIED = 100


class _Cut(NamedTuple):
    image: Image.Image
    text: str
    room: float  # beside the text, by the image's height


class CutLines:
    """A source of sheets of `size` (H, W), each filled with lines of all pages at one height."""

    def __init__(
        self,
        pages: TextLines,
        *,
        size: tuple[int, int],
        text: tuple[float, float],
        reads: int,
        close: float = 0.0,
        page: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
    ) -> None:
        """text: smallest and largest height of lines, in pixels; reads: questions of a sheet; close: share of
        sheets of which one line is looked at closely, and nothing else is asked. page: least and most times
        that an empty page is longer, each way, on which the sheet lies and is looked at closely; 1: none.
        """
        self.pages, self.size, self.text = pages, size, text
        self.reads, self.close, self.page, self.seed = reads, close, page, seed
        self.faults = pages.faults

    def __len__(self) -> int:
        return _SHEETS

    def where(self, index: int) -> str:
        return f"sheet {index} of lines from {self.pages.file.path}"

    def __getitem__(self, index: int) -> PageSample:
        if not 0 <= index < _SHEETS:
            raise IndexError(f"sheet {index} of {_SHEETS}")
        chance = random.Random(f"{self.seed}/{index}/sheet")
        paper = chance.randint(200, 255)
        sheet = Image.new("L", self.size[::-1], paper)
        lines = self._fill(sheet, chance)
        if chance.random() < 0.5:
            sheet = _noisy(sheet, chance)
        if self.page[1] > 1:
            return self._on_a_page(sheet, lines, chance)
        image = sheet.convert("RGB")
        if chance.random() < self.close:
            line = chance.choice(lines)
            messages, region = asked_closely(line, self.size, chance)
            return PageSample(
                images=(image,), messages=messages, regions=(region,), spelled=(line,), lines=tuple(lines)
            )
        messages, spelled = turns_about(lines, {}, self.size, reads=self.reads, chance=chance)
        return PageSample(images=(image,), messages=messages, spelled=spelled, lines=tuple(lines))

    def _on_a_page(self, sheet: Image.Image, lines: list[Line], chance: random.Random) -> PageSample:
        """Of which the sheet is shown closely, and nothing else is to be seen."""
        width, height = (round(side * chance.uniform(*self.page)) for side in sheet.size)
        left, top = chance.randint(0, width - sheet.width), chance.randint(0, height - sheet.height)
        page = Image.new("L", (width, height), chance.randint(200, 255))
        page.paste(sheet, (left, top))
        lines = [line.shifted(left, top) for line in lines]
        messages, spelled = turns_about(lines, {}, (height, width), reads=self.reads, chance=chance)
        region = fractions_of((left, top, left + sheet.width, top + sheet.height), (height, width))
        return PageSample(
            images=(page.convert("RGB"),),
            messages=messages,
            regions=(region,),
            spelled=spelled,
            lines=tuple(lines),
        )

    def _fill(self, sheet: Image.Image, chance: random.Random) -> list[Line]:
        """Sets lines row by row."""
        lines: list[Line] = []
        least, most = self.text
        height = least * (most / least) ** chance.random()
        top = chance.uniform(0, 0.3 * height)
        while top + 1.2 * height < sheet.height or not lines:
            left = chance.uniform(0, height)
            for _ in range(_TRIES):
                cut = self._cut(chance)
                scale = height * chance.uniform(0.85, 1.1) / ((1 - 2 * cut.room) * cut.image.height)
                width = round(cut.image.width * scale * chance.uniform(0.85, 1.15))
                tall = round(cut.image.height * scale)
                if not lines:
                    width = min(width, sheet.width - round(left))
                if left + width > sheet.width:
                    continue
                at = round(left), round(top)
                sheet.paste(_changed(cut.image.resize((width, tall), Image.Resampling.BILINEAR), chance), at)
                room = cut.room * tall
                box = (at[0] + room, at[1] + room, at[0] + width - room, at[1] + tall - room)
                lines.append(even_line(cut.text, box))
                left += width + chance.uniform(0, 0.7) * height
            top += height * chance.uniform(1.25, 1.55)
        return lines

    def _cut(self, chance: random.Random) -> _Cut:
        """A line of any page, pages with few lines as often as others. Raises ValueError where none can be
        cut.
        """
        for _ in range(_PAGES_TRIED):
            if cuts := _cuts(self.pages, chance.choice(self.pages.pages)):
                return chance.choice(cuts)
        raise ValueError(f"no line can be cut out of {_PAGES_TRIED} pages of {self.pages.file.path}")


@lru_cache(maxsize=4096)
def _cuts(pages: TextLines, number: int) -> list[_Cut]:
    """All lines of a page; none of one that cannot be read, of which a warning tells once."""
    try:
        return _cut_out(pages.path_of(number), pages.lines_of(number), pages.file.limits)
    except (OSError, ValueError) as error:
        warnings.warn(f"no line is cut out of {pages.path_of(number)}: {one_line(error)}", stacklevel=2)
        return []


def _cut_out(path: Path, lines: list[Line], limits: ImageLimits) -> list[_Cut]:
    page = open_image(path, limits=limits).convert("L")
    cuts = []
    for line in lines:
        left, top, right, bottom = line.box
        room = _ROOM * (bottom - top)
        image = page.crop((round(left - room), round(top - room), round(right + room), round(bottom + room)))
        if not all(image.size):
            continue
        share = room / (bottom - top + 2 * room)
        scale = min(1.0, _KEPT_HEIGHT / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        cuts.append(_Cut(image.resize(size, Image.Resampling.BOX), line.text, share))
    return cuts


def _changed(image: Image.Image, chance: random.Random) -> Image.Image:
    """In contrast and brightness."""
    gain, shift = chance.uniform(0.7, 1.1), chance.uniform(-20, 15)
    return image.point([min(max(round((value - 128) * gain + 128 + shift), 0), 255) for value in range(256)])


def _noisy(image: Image.Image, chance: random.Random) -> Image.Image:
    noise = np.random.default_rng(chance.getrandbits(32)).standard_normal((image.height, image.width))
    grey = np.asarray(image, dtype=np.float32) + chance.uniform(2, 14) * noise
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))
