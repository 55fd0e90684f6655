"""Pictures put together on a sheet, with a line of text over each, and the sheet's file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CAPTION",
    "MARGIN",
    "SHEET_WIDTH",
    "check_target",
    "in_rows",
    "save_whole",
    "side_by_side",
    "stack",
    "text_width",
    "write_text",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_WIDTH = 1600
MARGIN = 12
CAPTION = 20  # height of a line of text
FONT = 13


def save_whole(sheet: Image.Image, path: Path) -> None:
    """To a file whose name's ending tells the format. It is there whole, or as it was before."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        sheet.save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Raises ValueError where `save_whole` could not write to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'not permitted'}")


def in_rows(panels: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Panels, in their order, in rows that are no wider than a sheet."""
    rows: list[list[Image.Image]] = [[]]
    for panel in panels:
        if rows[-1] and sum(p.width + MARGIN for p in (*rows[-1], panel)) + MARGIN > SHEET_WIDTH:
            rows.append([])
        rows[-1].append(panel)
    return rows


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in a row, with margins between and around them but for the top."""
    width = sum(panel.width + MARGIN for panel in panels) + MARGIN
    row = Image.new("RGB", (width, max(panel.height for panel in panels) + MARGIN), "white")
    left = MARGIN
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + MARGIN
    return row


def write_text(image: Image.Image, place: tuple[int, int], text: str, colour: str) -> None:
    """place: (left, top) of the text."""
    ImageDraw.Draw(image).text(place, text, fill=colour, font=ImageFont.load_default(FONT))


def text_width(text: str) -> int:
    """Of one line, in pixels."""
    return int(ImageFont.load_default(FONT).getlength(text)) + 1


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows below one another."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
