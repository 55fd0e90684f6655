"""The drawing of the views shows each view's own part of the source, at the view's size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stepwell.structures import Box, Geometry, Size, TokenLayout, TokenRun, View
from stepwell.views.panels import CAPTION, MARGIN, SHEET_WIDTH
from stepwell.views.preprocess import to_tensor
from stepwell.views.sheet import PANEL_WIDTH, SMALL, draw_views


class Cuts(Geometry):
    """Given parts of an image, each resized to its view; what lies outside is black."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, *views: tuple[Size, Box, Size]) -> None:
        self.cuts = tuple(
            View(name=str(i), size=size, box=box, grid=grid) for i, (size, box, grid) in enumerate(views)
        )

    def layout(self, size: Size) -> TokenLayout:
        sizes = tuple(view.size for view in self.cuts)
        return TokenLayout(image_size=size, inputs=sizes, views=self.cuts, runs=(TokenRun(count=1),))

    def inputs(self, image: Image.Image, layout: TokenLayout) -> list[torch.Tensor]:
        parts = [image.crop(tuple(map(round, view.box))) for view in layout.views]
        return [
            to_tensor(part, view.size, self.mean, self.std)
            for part, view in zip(parts, layout.views, strict=True)
        ]


def panel(drawn: Image.Image, size: Size) -> np.ndarray:
    """The last panel's image: panels end one margin before the right edge."""
    pixels = np.asarray(drawn)
    top = CAPTION + MARGIN + CAPTION
    return pixels[top : top + size[0], -MARGIN - size[1] : -MARGIN]


def halves(left: str, right: str, size: tuple[int, int] = (600, 300)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(Image.new("RGB", (size[0] // 2, size[1]), right), (size[0] // 2, 0))
    return image


def test_a_view_of_the_right_half_shows_the_right_half() -> None:
    image = halves("white", "blue")
    drawn = draw_views([image], Cuts(((300, 300), (300.0, 0.0, 600.0, 300.0), (2, 2))))
    inside = panel(drawn, (300, 300))
    assert tuple(inside[70, 70]) == (0, 0, 255)
    assert tuple(inside[220, 220]) == (0, 0, 255)


def test_grid_lines_part_the_view_into_its_cells() -> None:
    image = Image.new("RGB", (400, 300), "white")
    drawn = draw_views([image], Cuts(((300, 400), (0.0, 0.0, 400.0, 300.0), (3, 4))))
    inside = panel(drawn, (300, 400))
    row, column = inside[50], inside[:, 50]
    assert np.flatnonzero((row != 255).any(-1)).tolist() == [0, 100, 200, 300, 399]
    assert np.flatnonzero((column != 255).any(-1)).tolist() == [0, 100, 200, 299]


def test_a_view_that_reaches_past_the_image_shows_what_its_encoder_is_given_there() -> None:
    image = Image.new("RGB", (400, 200), "white")
    drawn = draw_views([image], Cuts(((400, 400), (0.0, -100.0, 400.0, 300.0), (1, 1))))
    inside = panel(drawn, (400, 400))
    assert tuple(inside[50, 200]) == tuple(inside[350, 200]) == (0, 0, 0)
    assert tuple(inside[200, 200]) == (255, 255, 255)


def test_large_views_are_shrunk_and_thin_ones_survive() -> None:
    image = Image.new("RGB", (9000, 3), "white")
    whole: Box = (0.0, 0.0, 9000.0, 3.0)
    drawn = draw_views([image, image], Cuts(((16, 4096), whole, (1, 256))))
    assert drawn.width == 2 * PANEL_WIDTH + 3 * MARGIN
    assert drawn.height < 200


def test_panels_go_on_in_the_next_row_before_the_sheet_grows_too_wide() -> None:
    image = Image.new("RGB", (600, 100), "white")
    whole: Box = (0.0, 0.0, 600.0, 100.0)
    drawn = draw_views([image], Cuts(*[((100, 600), whole, (1, 9))] * 3))
    assert drawn.size == (2 * 600 + 3 * MARGIN, CAPTION + MARGIN + 2 * (CAPTION + 100 + MARGIN))


def test_an_image_of_one_pixel_can_be_seen() -> None:
    image = Image.new("RGB", (1, 1), "black")
    drawn = np.asarray(draw_views([image], Cuts(((64, 64), (0.0, 0.0, 1.0, 1.0), (1, 1)))))
    source = drawn[2 * CAPTION + MARGIN :, MARGIN : MARGIN + SMALL]
    assert (source[4 : SMALL - 4, 4 : SMALL - 4] == 0).all()


def test_a_view_that_lies_wholly_in_padding_is_drawn() -> None:
    image = Image.new("RGB", (400, 200), "white")
    drawn = draw_views([image], Cuts(((300, 300), (0.0, 300.0, 64.0, 364.0), (1, 1))))
    assert tuple(panel(drawn, (300, 300))[30, 30]) == (0, 0, 0)


def test_a_box_that_reaches_into_padding_is_drawn_as_far_as_the_image_goes() -> None:
    image = Image.new("RGB", (400, 200), "white")
    beyond, within = (
        draw_views([image], Cuts(((300, 300), box, (1, 1))))
        for box in ((-50.0, -100.0, 450.0, 300.0), (0.0, 0.0, 400.0, 200.0))
    )
    source = (0, 0, MARGIN + 400 + MARGIN, beyond.height)  # its caption, its edges, and what is beside it
    assert beyond.crop(source).tobytes() == within.crop(source).tobytes()


def test_strided_pixels_are_drawn_as_they_are_and_not_as_a_thumbnail() -> None:
    class Strided(Cuts):
        def inputs(self, image: Image.Image, layout: TokenLayout) -> list[torch.Tensor]:
            return [to_tensor(image, (image.height, image.width), self.mean, self.std)[:, ::2, 1::2]]

    pixels = np.zeros((400, 400, 3), dtype=np.uint8)
    pixels[::2, 1::2] = 255  # a thumbnail would be grey
    geometry = Strided(((200, 200), (0.0, 0.0, 400.0, 400.0), (1, 1)))
    assert (panel(draw_views([Image.fromarray(pixels)], geometry), (200, 200))[1:-1, 1:-1] == 255).all()


def test_only_views_of_the_same_part_are_drawn_inside_one_another() -> None:
    image = Image.new("RGB", (400, 300), "white")
    left, right = (0.0, 0.0, 200.0, 300.0), (200.0, 0.0, 400.0, 300.0)
    drawn = np.asarray(draw_views([image], Cuts(*(((30, 20), box, (1, 1)) for box in (left, right, right)))))
    source = drawn[2 * CAPTION + MARGIN :, MARGIN : MARGIN + 400]
    inked = np.flatnonzero((source[150] != 255).any(-1)).tolist()
    assert inked == [0, 1, 198, 199, 200, 201, 202, 203, 396, 397, 398, 399]


class Tiles(Cuts):
    """An image cut into a grid of tiles of one size, and an overview of 60 x 60."""

    def __init__(self, size: Size, tiles: Size, tile: Size, token_grid: Size = (0, 0)) -> None:
        (height, width), (rows, cols) = (size[0] / tiles[0], size[1] / tiles[1]), tiles
        boxes = [
            (width * col, height * row, width * (col + 1), height * (row + 1))
            for row in range(rows)
            for col in range(cols)
        ]
        overview: Box = (0.0, 0.0, float(size[1]), float(size[0]))
        super().__init__(*((tile, box, (1, 1)) for box in boxes), ((60, 60), overview, (1, 1)))
        self.tiles, self.token_grid = tiles, token_grid

    def layout(self, size: Size) -> TokenLayout:
        return replace(super().layout(size), tiles=self.tiles, token_grid=self.token_grid)


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (5, 3), (1, 4), (3, 1)])
def test_tiles_are_drawn_as_they_lie_in_the_image_however_many(rows: int, cols: int) -> None:
    class Numbered(Tiles):
        mean, std = (0.0,) * 3, (1.0,) * 3

        def inputs(self, image: Image.Image, layout: TokenLayout) -> list[torch.Tensor]:
            """Tile i is of the colour (i, 0, 255)."""
            return [
                torch.tensor([i / 255, 0, 1]).view(3, 1, 1).expand(3, *size)
                for i, size in enumerate(layout.inputs)
            ]

    image = Image.new("RGB", (900, 900), "white")
    drawn = np.asarray(draw_views([image], Numbered((900, 900), (rows, cols), (300, 300))))
    left_tops = []
    for i in range(rows * cols):
        found = np.argwhere((drawn == (i, 0, 255)).all(-1))
        assert (found.max(0) - found.min(0)).tolist() == [297, 297], "the tile inside of its grid's lines"
        left_tops.append(found.min(0) - (CAPTION + 300 + MARGIN, 300 + MARGIN) * np.array(divmod(i, cols)))
    assert len({tuple(place) for place in left_tops}) == 1


def test_tiles_in_a_long_row_are_shrunk_to_the_sheet() -> None:
    image = Image.new("RGB", (3000, 500), "white")
    assert draw_views([image], Tiles((500, 3000), (1, 6), (336, 336))).width <= SHEET_WIDTH


def test_each_visual_token_of_a_view_is_a_dot_in_the_middle_of_its_window() -> None:
    image = Image.new("RGB", (400, 300), "white")
    geometry = Tiles((300, 400), (1, 1), (300, 400), token_grid=(2, 3))
    inked = (panel(draw_views([image], geometry), (300, 400)) != 255).any(-1)[2:-2, 2:-2]
    middles = [(75.0, 400 / 6), (75.0, 200.0), (75.0, 2000 / 6)]
    middles += [(225.0, x) for _, x in middles]
    places = np.argwhere(inked) + 2
    distances = np.stack([np.hypot(*(places + 0.5 - middle).T) for middle in middles])
    assert distances.min(axis=0).max() < 4, "nothing but dots"
    assert distances.min(axis=1).max() < 1, "a dot for each"


def test_dots_of_a_narrow_view_do_not_touch() -> None:
    image = Image.new("RGB", (80, 400), "white")
    geometry = Tiles((400, 80), (1, 1), (400, 80), token_grid=(2, 16))
    drawn = np.asarray(draw_views([image], geometry))
    row = drawn[2 * CAPTION + MARGIN + 100]
    inked = (row != 255).any(-1).astype(int)
    assert (np.diff(inked) == 1).sum() >= 16
