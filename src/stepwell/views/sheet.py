"""An image drawn with its views: where each lies in the source, and the tensors that the encoders are given.

For `stepwell ask --show`, and for anyone who wants to see what a model sees. Sizes are (height, width).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stepwell.images.draw import save_whole

if TYPE_CHECKING:
    from torch import Tensor

    from stepwell.structures import Box, Geometry, Size, TokenLayout, View

__all__ = ["check_target", "draw_views", "write_views"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_WIDTH = 1600
PANEL_HEIGHT = 640
PANEL_WIDTH = 780
SMALL = 32  # a short side below this is enlarged to it where the panel allows
MARGIN = 12
CAPTION = 20
DOT = 2  # radius of a token's
MAX_PANELS = 12  # an image, beside the tiles; one of more views says how many are left out
COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#5b8c5a", "#8f5aa8")


def draw_views(images: Sequence[Image.Image], geometry: Geometry) -> Image.Image:
    """For each image the source with the views' boxes, then each view as its encoder sees it, under its grid.
    Views that tile the image come last, as they lie in it.

    Views larger than a panel are shrunk to it, tiny ones enlarged; the caption keeps their true size.
    """
    return _stack([_draw_image(image, geometry) for image in images])


def write_views(path: Path, images: Sequence[Image.Image], geometry: Geometry) -> None:
    """`draw_views` to a file whose name's ending tells the format. It is there whole, or as it was before."""
    save_whole(draw_views(images, geometry), path)


def check_target(path: Path) -> None:
    """Raises ValueError where `write_views` could not write to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'not permitted'}")


def _draw_image(image: Image.Image, geometry: Geometry) -> Image.Image:
    layout = geometry.layout((image.height, image.width))
    views = geometry.views(geometry.inputs(image, layout), layout)
    rows, cols = layout.tiles
    num_tiles = rows * cols
    room = max((SHEET_WIDTH - MARGIN) // max(cols, 1) - MARGIN, SMALL)  # across, for each of the tiles
    drawn = [
        _draw_view(
            _pixels(tensor, geometry),
            view,
            COLOURS[i % len(COLOURS)],
            width=min(room, PANEL_WIDTH) if i < num_tiles else PANEL_WIDTH,
            tokens=layout.token_grid,
        )
        for i, (tensor, view) in enumerate(
            list(zip(views, layout.views, strict=True))[: num_tiles + MAX_PANELS]
        )
    ]
    panels = [_draw_source(image, layout), *drawn[num_tiles:]]
    if num_tiles:
        tiles = _stack([_side_by_side(drawn[i : i + cols]) for i in range(0, num_tiles, cols)])
        panels.append(tiles.crop((MARGIN, 0, tiles.width - MARGIN, tiles.height)))
    lines = [_side_by_side(line) for line in _wrap(panels)]
    title = _title(layout, undrawn=len(views) - len(drawn))
    heading = Image.new("RGB", (_text_width(title) + 2 * MARGIN, CAPTION + MARGIN), "white")
    _write(heading, (MARGIN, MARGIN // 2), title, "black")
    return _stack([heading, *lines])


def _title(layout: TokenLayout, undrawn: int) -> str:
    (height, width), (rows, cols) = layout.image_size, layout.token_grid
    title = f"{width} x {height} px, {layout.num_visual} visual tokens, {len(layout.views)} views"
    if undrawn:
        title += f" ({undrawn} not drawn)"
    if rows:
        title += f", a dot for each of a view's {cols} x {rows} tokens"
    return title


def _pixels(view: Tensor, geometry: Geometry) -> Image.Image:
    """(3, h, w), normalised -> the image it was made from."""
    values = view.movedim(0, -1).numpy() * geometry.std + geometry.mean
    return Image.fromarray(np.rint(values * 255).clip(0, 255).astype(np.uint8))


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
    times: dict[Box, int] = {}
    for i, view in enumerate(layout.views):
        # Of a box that reaches into padding, the part that lies in the image: captions stay legible.
        left, right = (min(max(edge, 0), image.width) * scale for edge in view.box[::2])
        top, bottom = (min(max(edge, 0), image.height) * scale for edge in view.box[1::2])
        inset = min(
            2 * times.get(view.box, 0), 12
        )  # views that show the same part stay visible beside one another
        times[view.box] = times.get(view.box, 0) + 1
        if right - left > 2 * inset + 2 and bottom - top > 2 * inset + 2:
            draw.rectangle(
                (left + inset, CAPTION + top + inset, right - inset - 1, CAPTION + bottom - inset - 1),
                outline=COLOURS[i % len(COLOURS)],
                width=2,
            )
    return panel


def _draw_view(shown: Image.Image, view: View, colour: str, *, width: int, tokens: Size) -> Image.Image:
    """A view of at most `width` under the grid of its cells and the dots of its tokens, where it has them."""
    rows, cols = view.grid
    caption = f"{view.name} {shown.width} x {shown.height}, {cols} x {rows} cells"
    panel, scale = _panel(shown, caption, colour, width)
    lined = panel.copy()
    draw = ImageDraw.Draw(lined)
    right, bottom = shown.width * scale, shown.height * scale
    for row in range(rows + 1):
        y = CAPTION + min(bottom * row / rows, bottom - 1)
        draw.line((0, y, right, y), fill=colour)
    for col in range(cols + 1):
        x = min(right * col / cols, right - 1)
        draw.line((x, CAPTION, x, CAPTION + bottom), fill=colour)
    blended = Image.blend(panel, lined, 0.5)  # small print stays legible under the grid
    _draw_dots(blended, (bottom, right), tokens, colour)
    return blended


def _draw_dots(panel: Image.Image, size: tuple[float, float], grid: Size, colour: str) -> None:
    """A dot in the middle of each cell of a grid over the panel's image."""
    draw = ImageDraw.Draw(panel)
    for row, col in product(*map(range, grid)):
        height, width = size[0] / grid[0], size[1] / grid[1]
        x, y = width * (col + 0.5), CAPTION + height * (row + 0.5)
        radius = min(DOT, width / 4, height / 4)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _panel(
    image: Image.Image, caption: str, colour: str, room: int = PANEL_WIDTH
) -> tuple[Image.Image, float]:
    """The image under its caption, at a scale that shows it well, in `room` across; and that scale."""
    scale = min(room / image.width, PANEL_HEIGHT / image.height)
    scale = min(scale, max(SMALL // min(image.size), 1))
    width, height = (max(round(side * scale), 1) for side in image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    wide = max(width, _text_width(caption))
    panel = Image.new("RGB", (wide, height + CAPTION), "white")
    panel.paste(image.resize((width, height), resample, reducing_gap=2.0), (0, CAPTION))
    _write(panel, (0, 2), caption, colour)
    return panel, scale


def _write(image: Image.Image, place: tuple[int, int], text: str, colour: str) -> None:
    ImageDraw.Draw(image).text(place, text, fill=colour, font=ImageFont.load_default(13))


def _text_width(text: str) -> int:
    return int(ImageFont.load_default(13).getlength(text)) + 1


def _stack(rows: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
