"""A picture drawn with its views: where each lies in the source, and the grid an encoder makes of it.

For `stepwell ask --show`, and for anyone who wants to see what a model sees. Sizes are (height, width).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from stepwell.structures import TokenLayout, View

__all__ = ["check_target", "draw_views", "write_views"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_WIDTH = 1600
PANEL_HEIGHT = 640
PANEL_WIDTH = 780
SMALL = 32  # a short side below this is enlarged to it where the panel allows
MARGIN = 12
CAPTION = 20
MAX_PANELS = 12  # a picture; one cut into more views says how many are left out
COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#5b8c5a", "#8f5aa8")


def draw_views(images: Sequence[Image.Image], layouts: Sequence[TokenLayout]) -> Image.Image:
    """For each picture the source with the views' boxes, then each view at its own scale under its grid.

    Views larger than a panel are shrunk to it, tiny ones enlarged; the caption keeps their true size.
    """
    return _stack([_draw_picture(image, layout) for image, layout in zip(images, layouts, strict=True)])


def write_views(path: Path, images: Sequence[Image.Image], layouts: Sequence[TokenLayout]) -> None:
    """`draw_views` to a file whose name's ending tells the format. It is there whole, or as it was before."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        draw_views(images, layouts).save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Raises ValueError where `write_views` could not write to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'not permitted'}")


def _draw_picture(image: Image.Image, layout: TokenLayout) -> Image.Image:
    height, width = layout.image_size
    panels = [_draw_source(image, layout)]
    panels += [
        _draw_view(image, view, COLOURS[i % len(COLOURS)]) for i, view in enumerate(layout.views[:MAX_PANELS])
    ]
    left_out = len(layout.views) - MAX_PANELS
    title = f"{width} x {height} px, {layout.num_tokens} visual tokens, {len(layout.views)} views"
    if left_out > 0:
        title += f" ({left_out} not drawn)"
    rows = [_side_by_side(row) for row in _wrap(panels)]
    heading = Image.new("RGB", (_text_width(title) + 2 * MARGIN, CAPTION + MARGIN), "white")
    _write(heading, (MARGIN, MARGIN // 2), title, "black")
    return _stack([heading, *rows])


def _wrap(panels: list[Image.Image]) -> list[list[Image.Image]]:
    """Into rows that are no wider than the sheet."""
    rows: list[list[Image.Image]] = [[]]
    for panel in panels:
        if rows[-1] and sum(p.width + MARGIN for p in (*rows[-1], panel)) + MARGIN > SHEET_WIDTH:
            rows.append([])
        rows[-1].append(panel)
    return rows


def _side_by_side(panels: list[Image.Image]) -> Image.Image:
    width = sum(panel.width + MARGIN for panel in panels) + MARGIN
    row = Image.new("RGB", (width, max(panel.height for panel in panels) + MARGIN), "white")
    left = MARGIN
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + MARGIN
    return row


def _draw_source(image: Image.Image, layout: TokenLayout) -> Image.Image:
    panel, scale = _panel(image, f"source {image.width} x {image.height}", "black")
    draw = ImageDraw.Draw(panel)
    for i, view in enumerate(layout.views):
        left, top, right, bottom = (edge * scale for edge in view.box)
        inset = min(2 * i, 12)  # views that show the same part stay visible beside one another
        if right - left > 2 * inset + 2 and bottom - top > 2 * inset + 2:
            draw.rectangle(
                (left + inset, CAPTION + top + inset, right - inset - 1, CAPTION + bottom - inset - 1),
                outline=COLOURS[i % len(COLOURS)],
                width=2,
            )
    return panel


def _draw_view(image: Image.Image, view: View, colour: str) -> Image.Image:
    height, width = view.size
    shown = _cut(image, view)
    rows, cols = view.grid
    panel, scale = _panel(shown, f"{view.name} {width} x {height}, {cols} x {rows} cells", colour)
    lined = panel.copy()
    draw = ImageDraw.Draw(lined)
    right, bottom = width * scale, height * scale
    for row in range(rows + 1):
        y = CAPTION + min(bottom * row / rows, bottom - 1)
        draw.line((0, y, right, y), fill=colour)
    for col in range(cols + 1):
        x = min(right * col / cols, right - 1)
        draw.line((x, CAPTION, x, CAPTION + bottom), fill=colour)
    return Image.blend(panel, lined, 0.5)  # small print stays legible under the grid


def _cut(image: Image.Image, view: View) -> Image.Image:
    """The view's part of the picture at the view's size; grey where the view reaches past the picture."""
    height, width = view.size
    left, top, right, bottom = view.box
    across, down = width / (right - left), height / (bottom - top)
    seen = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
    size = max(round((seen[2] - seen[0]) * across), 1), max(round((seen[3] - seen[1]) * down), 1)
    canvas = Image.new("RGB", (width, height), "lightgrey")
    part = image.resize(size, Image.Resampling.BICUBIC, box=seen, reducing_gap=2.0)
    canvas.paste(part, (round((seen[0] - left) * across), round((seen[1] - top) * down)))
    return canvas


def _panel(image: Image.Image, caption: str, colour: str) -> tuple[Image.Image, float]:
    """The picture under its caption, at a scale that shows it well; and that scale."""
    scale = min(PANEL_WIDTH / image.width, PANEL_HEIGHT / image.height)
    scale = min(scale, max(SMALL // min(image.size), 1))
    width, height = (max(round(side * scale), 1) for side in image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    wide = max(width, _text_width(caption))
    panel = Image.new("RGB", (wide, height + CAPTION), "white")
    panel.paste(image.resize((width, height), how, reducing_gap=2.0), (0, CAPTION))
    _write(panel, (0, 2), caption, colour)
    return panel, scale


def _write(picture: Image.Image, place: tuple[int, int], text: str, colour: str) -> None:
    ImageDraw.Draw(picture).text(place, text, fill=colour, font=ImageFont.load_default(13))


def _text_width(text: str) -> int:
    return int(ImageFont.load_default(13).getlength(text)) + 1


def _stack(rows: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
