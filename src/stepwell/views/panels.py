"""Pictures put together on a sheet, with a line of text over each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CAPTION",
    "MARGIN",
    "SHEET_WIDTH",
    "in_rows",
    "side_by_side",
    "stack",
    "text_width",
    "write_text",
]

SHEET_WIDTH = 1600
MARGIN = 12
CAPTION = 20  # height of a line of text
FONT = 13


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
