"""The picture of the views shows each view's own part of the source, at the view's size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from stepwell.structures import Box, Size, TokenLayout, TokenRun, View
from stepwell.views.sheet import CAPTION, MARGIN, PANEL_WIDTH, SMALL, draw_views


def layout(image: Image.Image, *views: tuple[Size, Box, Size]) -> TokenLayout:
    return TokenLayout(
        image_size=(image.height, image.width),
        inputs=tuple(size for size, _, _ in views),
        views=tuple(
            View(name=str(i), size=size, box=box, grid=grid) for i, (size, box, grid) in enumerate(views)
        ),
        runs=(TokenRun(count=1),),
    )


def panel(drawn: Image.Image, size: Size) -> np.ndarray:
    """The last panel's picture: panels end one margin before the right edge."""
    pixels = np.asarray(drawn)
    top = CAPTION + MARGIN + CAPTION
    return pixels[top : top + size[0], -MARGIN - size[1] : -MARGIN]


def halves(left: str, right: str, size: tuple[int, int] = (600, 300)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(Image.new("RGB", (size[0] // 2, size[1]), right), (size[0] // 2, 0))
    return image


def test_a_view_of_the_right_half_shows_the_right_half() -> None:
    image = halves("white", "blue")
    drawn = draw_views([image], [layout(image, ((300, 300), (300.0, 0.0, 600.0, 300.0), (2, 2)))])
    inside = panel(drawn, (300, 300))
    assert tuple(inside[70, 70]) == (0, 0, 255)
    assert tuple(inside[220, 220]) == (0, 0, 255)


def test_grid_lines_part_the_view_into_its_cells() -> None:
    image = Image.new("RGB", (400, 300), "white")
    drawn = draw_views([image], [layout(image, ((300, 400), (0.0, 0.0, 400.0, 300.0), (3, 4)))])
    inside = panel(drawn, (300, 400))
    row, column = inside[50], inside[:, 50]
    assert np.flatnonzero((row != 255).any(-1)).tolist() == [0, 100, 200, 300, 399]
    assert np.flatnonzero((column != 255).any(-1)).tolist() == [0, 100, 200, 299]


def test_a_view_that_reaches_past_the_picture_is_grey_there() -> None:
    image = Image.new("RGB", (400, 200), "white")
    drawn = draw_views([image], [layout(image, ((400, 400), (0.0, -100.0, 400.0, 300.0), (1, 1)))])
    inside = panel(drawn, (400, 400))
    assert tuple(inside[50, 200]) == tuple(inside[350, 200]) == (211, 211, 211)
    assert tuple(inside[200, 200]) == (255, 255, 255)


def test_large_views_are_shrunk_and_thin_ones_survive() -> None:
    image = Image.new("RGB", (9000, 3), "white")
    whole: Box = (0.0, 0.0, 9000.0, 3.0)
    drawn = draw_views([image, image], [layout(image, ((16, 4096), whole, (1, 256)))] * 2)
    assert drawn.width == 2 * PANEL_WIDTH + 3 * MARGIN
    assert drawn.height < 200


def test_panels_go_on_in_the_next_row_before_the_sheet_grows_too_wide() -> None:
    image = Image.new("RGB", (600, 100), "white")
    whole: Box = (0.0, 0.0, 600.0, 100.0)
    drawn = draw_views([image], [layout(image, *[((100, 600), whole, (1, 9))] * 3)])
    assert drawn.size == (2 * 600 + 3 * MARGIN, CAPTION + MARGIN + 2 * (CAPTION + 100 + MARGIN))


def test_a_picture_of_one_pixel_can_be_seen() -> None:
    image = Image.new("RGB", (1, 1), "black")
    drawn = np.asarray(draw_views([image], [layout(image, ((64, 64), (0.0, 0.0, 1.0, 1.0), (1, 1)))]))
    source = drawn[2 * CAPTION + MARGIN :, MARGIN : MARGIN + SMALL]
    assert (source[4 : SMALL - 4, 4 : SMALL - 4] == 0).all()
