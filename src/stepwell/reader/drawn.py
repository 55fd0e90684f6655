"""Drawn pages whose answers are known: receipts and documents, with the box and character edges of every
line.

A page is a function of (seed, index) alone. Text sizes are em sizes in pixels of the page; answers are in
capitals, as the transcriptions of scanned receipts are.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from stepwell.reader import words
from stepwell.reader.glyphs import FONTS, Face, face
from stepwell.reader.page import Line, PageSample
from stepwell.reader.questions import turns_about
from stepwell.structures import Size

__all__ = ["DrawnPages", "Page", "draw_page"]


class Page(NamedTuple):
    image: Image.Image
    lines: tuple[Line, ...]
    fields: dict[str, str]  # company, date, address, total: empty on a document


@dataclass(kw_only=True)
class _Sheet:
    """A page while it is filled from the top: ink, what was written, and the next free row."""

    ink: NDArray[np.uint8]
    chance: random.Random
    face: Face
    margin: int
    spacing: int = 0
    top: int = 0
    lines: list[Line] = field(default_factory=list)

    @property
    def width(self) -> int:
        return int(self.ink.shape[1]) - 2 * self.margin

    @property
    def full(self) -> bool:
        return self.top + self.face.line_height + self.margin > int(self.ink.shape[0])

    def row(self, *texts: str, align: str = "left", face: Face | None = None) -> list[str]:
        """Writes the texts in one row: one of them aligned, several spread from the left to the right margin.

        Returns what was written of each; a text too long for its part of the row is cut.
        """
        if self.full:
            return []
        face = face or self.face
        part = self.width // len(texts)
        sides = [align] if len(texts) == 1 else ["left", *["right"] * (len(texts) - 1)]
        written = []
        for place, (text, side) in enumerate(zip(texts, sides, strict=True)):
            text = self._fit(text, face, part)
            free = part - face.width(text, self.spacing)
            shift = {"left": 0, "center": free // 2, "right": free}[side]
            line = face.draw(
                self.ink, self.margin + place * part + max(shift, 0), self.top, text, self.spacing
            )
            if line is not None:
                self.lines.append(line)
                written.append(line.text)
        self.top += round(face.line_height * self.chance.uniform(0.9, 1.35))
        return written

    def skip(self, share: float) -> None:
        self.top += round(self.face.line_height * share)

    def rule(self) -> None:
        """A row of hyphens or a thin stroke, not counted as text."""
        if self.full:
            return
        at = self.top + self.face.line_height // 2
        step = self.chance.choice((1, 1, self.face.size // 2 + 2))
        self.ink[at : at + self.chance.randint(1, 2), self.margin : self.margin + self.width : step] = 255
        self.skip(1.0)

    def _fit(self, text: str, face: Face, width: int) -> str:
        while len(text) > 1 and face.width(text, self.spacing) > width:
            text = text[: len(text) - max(1, len(text) // 8)].rstrip()
        return text


def draw_page(seed: int, index: int, *, size: Size, text: tuple[int, int], kind: str = "mixed") -> Page:
    """Page `index` of the endless book `seed`.

    size = (H, W) in pixels; text = smallest and largest em in pixels; kind "receipt", "document", "lines"
    (unrelated lines, as dense as they go) or "mixed". Raises ValueError for an unknown kind or a page too
    small for its text.
    """
    if kind not in ("receipt", "document", "lines", "mixed"):
        raise ValueError(f"unknown kind of page {kind!r}; choose receipt, document, lines or mixed")
    if not 4 <= text[0] <= text[1] or min(size) < 2 * text[1]:
        raise ValueError(f"text of {text[0]}..{text[1]} px does not fit a page of {size[0]}x{size[1]}")
    chance = random.Random(f"{seed}/{index}")
    if kind == "mixed":
        kind = chance.choices(("receipt", "document", "lines"), (5, 2, 3))[0]
    em = round(text[0] * (text[1] / text[0]) ** chance.random())
    sheet = _Sheet(
        ink=np.zeros(size, dtype=np.uint8),
        chance=chance,
        face=face(chance.choice(FONTS), em),
        margin=round(size[1] * chance.uniform(0.01, 0.08)),
        spacing=chance.choice((0, 0, 0, 1)),
    )
    sheet.top = round(size[0] * chance.uniform(0.0, 0.04))
    fields = {"receipt": _receipt, "document": _document, "lines": _lines}[kind](sheet, text)
    image = Image.fromarray(_print(sheet.ink, chance)).convert("RGB")
    if chance.random() < 0.25:
        image = _recompress(image, chance.randint(35, 85))
    lines = tuple(
        replace(line, text=line.text.upper())
        for line in sheet.lines
        if len(line.text.upper()) == len(line.text)
    )
    return Page(image, lines, fields)


def _receipt(sheet: _Sheet, text: tuple[int, int]) -> dict[str, str]:
    chance, fields = sheet.chance, {}
    heading = face(sheet.face.name, min(text[1], round(sheet.face.size * chance.uniform(1.0, 1.5))))
    align = chance.choice(("center", "center", "left"))
    if name := sheet.row(words.company(chance), align=align, face=heading):
        fields["company"] = name[0]
    place = [written for line in words.address(chance) for written in sheet.row(line, align=align)]
    if place:
        fields["address"] = " ".join(place)
    if chance.random() < 0.6:
        sheet.row(f"TEL: {words.telephone(chance)}", align=align)
    if chance.random() < 0.5:
        sheet.row(
            chance.choice(("TAX INVOICE", "CASH BILL", "INVOICE", "RECEIPT")), align="center", face=heading
        )
    sheet.skip(chance.uniform(0, 1))
    _date_row(sheet, fields)
    for _ in range(chance.randint(0, 2)):
        sheet.row(f"{words.phrase(chance, 1)} {words.code(chance)}")
    sheet.rule()
    below = round(sheet.face.line_height * chance.uniform(6, 10))
    while sheet.top + below < sheet.ink.shape[0] and chance.random() < 0.93:
        row = [words.item(chance), words.amount(chance)]
        if chance.random() < 0.3:
            row.insert(1, str(chance.randint(1, 9)))
        sheet.row(*row)
    sheet.rule()
    _sums(sheet, fields)
    while not sheet.full and chance.random() < 0.85:
        sheet.row(words.phrase(chance, chance.randint(1, 5)), align=chance.choice(("center", "left")))
    return {name: value.upper() for name, value in fields.items()}


def _date_row(sheet: _Sheet, fields: dict[str, str]) -> None:
    chance = sheet.chance
    date = words.date(chance)
    clock = f"{chance.randint(0, 23):02}:{chance.randint(0, 59):02}"
    label = chance.choice(("DATE: ", "Date : ", "DATE ", "", "Date:", "INV DATE: "))
    style = chance.random()
    if style < 0.4:
        written = sheet.row(f"{label}{date}")
    elif style < 0.7:
        written = sheet.row(f"{label}{date}", clock)
    else:
        written = sheet.row(f"{label}{date} {clock}")
    if written and date in written[0]:
        fields["date"] = date


def _sums(sheet: _Sheet, fields: dict[str, str]) -> None:
    chance = sheet.chance
    total = words.amount(chance)
    paid = f"{float(total) + chance.choice((0, 0.1, 1.5, 5, 10)):.2f}"
    currency = chance.choice(("", "", "RM", "RM ", "$"))
    label = chance.choice(
        ("TOTAL", "TOTAL", "TOTAL:", "GRAND TOTAL", "TOTAL AMOUNT", "NET TOTAL", "TOTAL (RM)", "TOTAL SALES")
    )
    large = face(sheet.face.name, round(sheet.face.size * chance.choice((1.0, 1.0, 1.2))))
    if chance.random() < 0.5:
        sheet.row(chance.choice(("SUBTOTAL", "SUB TOTAL", "ITEMS")), words.amount(chance, float(total) + 1))
    if chance.random() < 0.4:
        sheet.row(chance.choice(("GST 6%", "TAX", "ROUNDING", "SERVICE CHARGE 10%")), words.amount(chance, 5))
    written = sheet.row(label, currency + total, face=large)
    if len(written) == 2 and written[1].endswith(total):
        fields["total"] = total
    if chance.random() < 0.7:
        sheet.row(chance.choice(("CASH", "VISA", "TENDERED", "PAID")), paid)
        sheet.row(chance.choice(("CHANGE", "CHANGE DUE", "BALANCE")), f"{float(paid) - float(total):.2f}")


def _document(sheet: _Sheet, text: tuple[int, int]) -> dict[str, str]:
    chance = sheet.chance
    heading = face(chance.choice(FONTS), text[1])
    sheet.row(
        words.phrase(chance, chance.randint(2, 4)), align=chance.choice(("center", "left")), face=heading
    )
    while not sheet.full:
        style = chance.random()
        if style < 0.5:
            count = max(2, sheet.width // (6 * sheet.face.size // 2))
            for _ in range(chance.randint(2, 5)):
                sheet.row(words.phrase(chance, count))
        elif style < 0.8:
            for _ in range(chance.randint(1, 4)):
                sheet.row(words.phrase(chance, 1), words.phrase(chance, 2))
        else:
            sheet.rule()
        sheet.skip(chance.uniform(0.2, 1.0))
    return {}


def _lines(sheet: _Sheet, text: tuple[int, int]) -> dict[str, str]:
    chance = sheet.chance
    while not sheet.full:
        em = round(text[0] * (text[1] / text[0]) ** chance.random())
        other = face(chance.choice(FONTS), em)
        if sheet.top + other.line_height + sheet.margin > sheet.ink.shape[0]:
            break
        texts = [words.phrase(chance, chance.randint(1, 4)) for _ in range(chance.choice((1, 1, 2)))]
        sheet.row(*texts, align=chance.choice(("left", "center", "right")), face=other)
    return {}


def _print(ink: NDArray[np.uint8], chance: random.Random) -> NDArray[np.uint8]:
    """Coverage (H, W) -> grey page (H, W): ink and paper shades, softness, unevenness and grain."""
    softness = chance.choice((0.0, 0.0, 0.4, 0.7, 1.0))
    if softness:
        ink = np.asarray(Image.fromarray(ink).filter(ImageFilter.GaussianBlur(softness)))
    paper, dark = chance.uniform(190, 255), chance.uniform(0, 110)
    numbers = np.random.default_rng(chance.getrandbits(64))
    page = paper - ink.astype(np.float32) * ((paper - dark) / 255)
    height, width = ink.shape
    slope = numbers.uniform(-12, 12, size=2)
    page += np.linspace(-slope[0], slope[0], height, dtype=np.float32)[:, None]
    page += np.linspace(-slope[1], slope[1], width, dtype=np.float32)[None]
    if grain := chance.choice((0.0, 0.0, 3.0, 8.0)):
        tile = numbers.standard_normal((128, 128), dtype=np.float32) * grain
        page += np.tile(tile, (height // 128 + 1, width // 128 + 1))[:height, :width]
    return page.clip(0, 255).astype(np.uint8)


def _recompress(image: Image.Image, quality: int) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return Image.open(stored).convert("RGB")


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
        page: str = "mixed",
    ) -> None:
        """sides: smallest and largest long side in pixels; aspect: smallest and largest height / width."""
        self.count, self.seed, self.sides, self.aspect = count, seed, sides, aspect
        self.text, self.reads, self.page = text, reads, page

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return f"drawn page {index} of seed {self.seed}"

    def __getitem__(self, index: int) -> PageSample:
        if not 0 <= index < self.count:
            raise IndexError(f"page {index} of {self.count}")
        chance = random.Random(f"{self.seed}/{index}/questions")
        long_side = chance.randint(*self.sides)
        ratio = self.aspect[0] * (self.aspect[1] / self.aspect[0]) ** chance.random()
        size = (long_side, round(long_side / ratio)) if ratio >= 1 else (round(long_side * ratio), long_side)
        page = draw_page(self.seed, index, size=size, text=self.text, kind=self.page)
        messages, spelled = turns_about(page.lines, page.fields, size, reads=self.reads, chance=chance)
        return PageSample(images=(page.image,), messages=messages, spelled=spelled, lines=page.lines)
