"""Crops of an image: the grid, what is encoded, where it lies, and what its pixels are."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stepwell.views.crops import CropGeometry, nearest_grid

SIDE = 16
CODE = CropGeometry(
    name="",
    side=SIDE,
    stride=4,
    framing="pad",
    grid=(3, 3),
    max_crops=1,
    local_crops=True,
    global_crops="middle",
    low="sampled",
    enlarged=False,
    every_cell=False,
    mean=(0.0,) * 3,
    std=(1 / 255,) * 3,  # tensors hold 8-bit values
)
FREE = replace(CODE, grid=None, max_crops=6, framing="squeeze", low="resized", global_crops="all")


def noise(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def viewed(geometry: CropGeometry, image: Image.Image) -> tuple[Any, dict[str, torch.Tensor]]:
    layout = geometry.layout((image.height, image.width))
    inputs = geometry.inputs(image, layout)
    assert tuple(tuple(x.shape[1:]) for x in inputs) == layout.inputs
    views = geometry.views(inputs, layout)
    assert [tuple(x.shape[1:]) for x in views] == [view.size for view in layout.views]
    return layout, dict(zip([view.name for view in layout.views], views, strict=True))


def test_the_official_form_sees_ten_views_of_a_padded_square():
    image = noise(30, 48)
    layout, views = viewed(CODE, image)
    square = Image.new("RGB", (48, 48))  # this mean is black
    square.paste(image, (0, 9))
    fine = pixels(square)
    assert list(views) == [f"local {i}.{j}" for i in (1, 2, 3) for j in (1, 2, 3)] + ["global 2.2"]
    assert torch.allclose(views["local 2.3"], fine[:, 16:32, 32:48], atol=1e-3)
    assert torch.allclose(views["global 2.2"], fine[:, 1::3, 1::3], atol=1e-3)
    assert layout.views[5].box == (32, 7, 48, 23)  # of 48 pixels, from 9 above the image on
    assert layout.views[-1].box == (0, -9, 48, 39)
    assert layout.num_visual == 16
    assert layout.tiles == (3, 3)


@pytest.mark.parametrize("count", [3, 5])
def test_a_sampled_small_view_is_the_global_crop_in_the_middle(count):
    geometry = replace(CODE, grid=(count, count), framing="squeeze")
    _, views = viewed(geometry, noise(40, 40))
    _, every = viewed(replace(geometry, global_crops="none"), noise(40, 40))
    middle = f"global {count // 2 + 1}.{count // 2 + 1}"
    assert "whole" not in views
    assert torch.equal(views[middle], every["whole"])


@pytest.mark.parametrize("side", [16, 24, 31])
def test_it_is_so_however_large_the_image_was_before(side):
    """Both resizes without a filter sample the same points."""
    image = torch.rand(1, 3, side, side, dtype=torch.float64)
    fine, small = (F.interpolate(image, n, mode="bicubic", align_corners=False) for n in (48, 16))
    assert torch.allclose(fine[..., 1::3, 1::3], small, atol=1e-12)


def test_an_even_grid_has_a_small_view_of_its_own():
    geometry = replace(CODE, grid=(2, 2), framing="squeeze")
    layout, views = viewed(geometry, noise(32, 32))
    assert [name for name in views if not name.startswith("local")] == [
        *("global 1.1", "global 1.2", "global 2.1", "global 2.2", "whole"),
    ]
    fine = pixels(noise(32, 32))[None]
    expected = F.interpolate(fine, SIDE, mode="bicubic", align_corners=False)[0]
    assert torch.allclose(views["whole"], expected, atol=1e-2)
    assert layout.inputs == ((32, 32),)


def test_a_grid_that_is_odd_one_way_alone_has_a_small_view_of_its_own():
    for grid in ((3, 2), (2, 3)):
        _, views = viewed(replace(CODE, grid=grid, framing="squeeze"), noise(48, 48))
        assert "whole" in views


def test_half_precision_is_resized_in_single():
    image = torch.rand(3, 32, 32).bfloat16()
    geometry = replace(CODE, grid=(2, 2))
    *_, whole = geometry.views([image], geometry.layout((32, 32)))
    expected = F.interpolate(image[None].float(), SIDE, mode="bicubic", align_corners=False)[0]
    assert torch.equal(whole, expected.bfloat16())


def test_the_official_loader_makes_a_small_image_large_again():
    layout, views = viewed(replace(CODE, enlarged=True, framing="squeeze"), noise(100, 60))
    assert layout.inputs == ((SIDE, SIDE),)
    small = pixels(noise(100, 60).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    fine = F.interpolate(small[None], 48, mode="bicubic", align_corners=False)[0]
    assert torch.allclose(views["local 1.2"], fine[:, :16, 16:32], atol=1e-2)
    assert torch.allclose(views["global 2.2"], small, atol=1e-2)


def test_a_small_view_of_the_source_is_filtered():
    image = noise(96, 64)
    layout, views = viewed(FREE, image)
    assert layout.inputs == ((3 * SIDE, 2 * SIDE), (SIDE, SIDE))
    assert torch.allclose(
        views["whole"], pixels(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)), atol=1e-3
    )
    fine = pixels(image.resize((2 * SIDE, 3 * SIDE), Image.Resampling.BICUBIC))
    assert torch.allclose(views["global 3.2"], fine[:, 2::3, 1::2], atol=1e-3)
    assert layout.views[3].box == (32, 32, 64, 64)


def test_a_grid_of_one_is_the_small_view_alone():
    for geometry in (
        replace(FREE, max_crops=1),
        replace(CODE, grid=(1, 1)),
        replace(CODE, grid=(1, 1), low="none"),
    ):
        layout, views = viewed(geometry, noise(20, 20))
        assert list(views) == ["whole"]
        assert layout.inputs == ((SIDE, SIDE),)
        assert layout.num_visual == 16


def test_a_cropped_square_is_the_middle_of_the_image():
    _, views = viewed(replace(CODE, framing="crop"), noise(48, 80))
    fine = pixels(noise(48, 80))[:, :, 16:64]
    assert torch.allclose(views["local 1.1"], fine[:, :16, :16], atol=1e-3)
    assert CODE.layout((48, 80)).views[0].box != replace(CODE, framing="crop").layout((48, 80)).views[0].box


def test_every_cell_is_a_token_where_nothing_is_reduced():
    assert replace(CODE, every_cell=True, low="none").layout((48, 48)).num_visual == 9 * 16


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    max_crops=st.integers(1, 16),
)
def test_the_grid_is_the_nearest_in_aspect_and_the_largest_of_equals(size, max_crops):
    grid = nearest_grid(size, max_crops)
    assert prod(grid) <= max_crops
    aspect = Fraction(size[1], size[0])

    def distance(grid: tuple[int, int]) -> Fraction:
        ratio = Fraction(grid[1], grid[0]) / aspect
        return max(ratio, 1 / ratio)

    for rows in range(1, max_crops + 1):
        for cols in range(1, max_crops // rows + 1):
            other = (rows, cols)
            assert distance(grid) <= distance(other) * Fraction(1_000_000_001, 1_000_000_000)
            if Fraction(cols, rows) == Fraction(grid[1], grid[0]):
                assert prod(other) <= prod(grid)


@given(size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_local_crops_tile_the_image(size):
    layout = FREE.layout(size)
    rows, cols = layout.tiles
    tiles = layout.views[: rows * cols]
    if tiles:
        assert tiles[0].box[:2] == (0, 0)
        assert tiles[-1].box[2:] == pytest.approx((size[1], size[0]))
        area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (view.box for view in tiles))
        assert area == pytest.approx(size[0] * size[1])
    assert len(layout.views) == (2 * rows * cols if tiles else 0) + 1
    assert layout.num_visual == 16


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="at least one pixel each way, got 0x5"):
        CODE.layout((0, 5))
