"""An image drawn with its views: where each lies in the source, and the tensors that the encoders are given.

For `stepwell ask --show`, and for anyone who wants to see what a model sees. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from stepwell.images.draw import save_whole
from stepwell.views.panels import (
    CAPTION,
    MARGIN,
    SHEET_WIDTH,
    in_rows,
    side_by_side,
    stack,
    text_width,
    write_text,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stepwell.structures import Box, Geometry, Region, Size, TokenLayout, View

__all__ = ["draw_views", "write_views"]

PANEL_HEIGHT = 640
PANEL_WIDTH = 780
SMALL = 32  # a short side below this is enlarged to it where the panel allows
DOT = 2  # radius of a token's
MAX_PANELS = 12  # an image, beside the tiles; one of more views says how many are left out
COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#5b8c5a", "#8f5aa8")


def draw_views(
    images: Sequence[Image.Image], geometry: Geometry, regions: Sequence[Region | None] | None = None
) -> Image.Image:
    """For each image the source with the views' boxes, then each view as its encoder sees it, under its grid.
    Views that tile the image come last, as they lie in it. regions: one an image, or None.

    Views larger than a panel are shrunk to it, tiny ones enlarged; the caption keeps their true size.
    """
    regions = [None] * len(images) if regions is None else regions
    return stack(
        [_draw_image(image, geometry, region) for image, region in zip(images, regions, strict=True)]
    )


def write_views(
    path: Path,
    images: Sequence[Image.Image],
    geometry: Geometry,
    regions: Sequence[Region | None] | None = None,
) -> None:
    """`draw_views` to a file whose name's ending tells the format. It is there whole, or as it was before."""
    save_whole(draw_views(images, geometry, regions), path)


def _draw_image(image: Image.Image, geometry: Geometry, region: Region | None) -> Image.Image:
    layout = geometry.layout_of((image.height, image.width), region)
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
        tiles = stack([side_by_side(drawn[i : i + cols]) for i in range(0, num_tiles, cols)])
        panels.append(tiles.crop((MARGIN, 0, tiles.width - MARGIN, tiles.height)))
    lines = [side_by_side(line) for line in in_rows(panels)]
    title = _title(layout, undrawn=len(views) - len(drawn))
    heading = Image.new("RGB", (text_width(title) + 2 * MARGIN, CAPTION + MARGIN), "white")
    write_text(heading, (MARGIN, MARGIN // 2), title, "black")
    return stack([heading, *lines])


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
    wide = max(width, text_width(caption))
    panel = Image.new("RGB", (wide, height + CAPTION), "white")
    panel.paste(image.resize((width, height), resample, reducing_gap=2.0), (0, CAPTION))
    write_text(panel, (0, 2), caption, colour)
    return panel, scale
