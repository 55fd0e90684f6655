"""All branches see the image at one shape, and published pyramids have torch's own sizes and pixels."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stepwell.views.preprocess import pad_to_square
from stepwell.views.pyramid import PyramidGeometry, exact_ratio, image_pyramid, pyramid_sizes, scaled_size

PYRAMIDS = [  # sides and strides
    ((448, 896, 1120), (16, 16, 16)),
    ((336, 1024), (14, 32)),
    ((336, 672, 1008), (14, 14, 14)),
    ((512, 1024), (16, 32)),
    ((256, 512, 768, 1024), (16, 16, 16, 32)),
    ((336,), (14,)),
]


@pytest.mark.parametrize(
    ("size", "sides", "strides", "expected"),
    [
        ((672, 1120), (448, 896, 1120), (16, 16, 16), ((256, 448), (512, 896), (640, 1120))),  # steps of 1/14
        ((480, 640), (336, 1024), (14, 32), ((252, 336), (768, 1024))),  # steps of 1/8: exactly 3:4
        ((1000, 100), (512, 1024), (16, 32), ((512, 48), (1024, 96))),  # 1:10 becomes 3:32
        ((1, 1), (512, 1024), (16, 32), ((512, 512), (1024, 1024))),
        ((1, 200), (336, 672), (14, 14), ((14, 336), (28, 672))),  # at least one cell
    ],
)
def test_sizes_worked_out_by_hand(size, sides, strides, expected) -> None:
    assert pyramid_sizes(size, sides=sides, strides=strides) == expected


images = st.tuples(st.integers(1, 16_384), st.integers(1, 16_384))


@given(images, st.sampled_from(PYRAMIDS), st.integers(1, 3))
def test_branches_share_the_shape_and_divide_by_their_strides(size, pyramid, min_cells) -> None:
    sides, strides = pyramid
    sizes = pyramid_sizes(size, sides=sides, strides=strides, min_cells=min_cells)
    for (height, width), side, stride in zip(sizes, sides, strides, strict=True):
        assert max(height, width) == side
        assert height % stride == width % stride == 0
        assert min(height, width) >= min_cells * stride
        assert height * sides[-1] == sizes[-1][0] * side
        assert width * sides[-1] == sizes[-1][1] * side
        assert (height - width) * (size[0] - size[1]) >= 0, "the long side stays the long side"


@cache
def short_sides(sides: tuple[int, ...], strides: tuple[int, ...]) -> set[int]:
    """All that the last branch can have."""
    longest = sides[-1]
    sizes = (pyramid_sizes((i, longest), sides=sides, strides=strides) for i in range(1, longest + 1))
    return {branches[-1][0] for branches in sizes}


@given(images, st.sampled_from(PYRAMIDS))
def test_no_other_short_side_is_nearer_to_the_aspect(size, pyramid) -> None:
    sides, strides = pyramid
    height, width = pyramid_sizes(size, sides=sides, strides=strides)[-1]
    exact = sides[-1] * min(size) / max(size)
    nearest = min(abs(side - exact) for side in short_sides(sides, strides))
    assert abs(min(height, width) - exact) == nearest


@given(images, st.sampled_from(PYRAMIDS))
def test_exact_ratios_make_exactly_these_sizes(size, pyramid) -> None:
    sides, strides = pyramid
    sizes = pyramid_sizes(size, sides=sides, strides=strides)
    assert tuple(scaled_size(sizes[-1], exact_ratio(side, sides[-1])) for side in sides) == sizes


def test_an_exact_ratio_repairs_a_division_that_was_rounded_down() -> None:
    assert math.floor(49 * (1 / 49)) == 0
    assert math.floor(49 * exact_ratio(1, 49)) == 1
    assert exact_ratio(448, 1120) == 448 / 1120


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sides": (500, 1024), "strides": (14, 32)}, "500 does not divide by stride 14; take 490"),
        ({"sides": (336, 352), "strides": (14, 32)}, "share no step"),
        ({"sides": (336,), "strides": (14, 14)}, "one side and one stride"),
        ({"sides": (), "strides": ()}, "one side and one stride"),
        ({"sides": (336,), "strides": (14,), "min_cells": 25}, "do not fit"),
    ],
)
def test_impossible_pyramids_say_why(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        pyramid_sizes((300, 400), **arguments)


def test_a_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5"):
        pyramid_sizes((0, 5), sides=(336,), strides=(14,))


@given(st.integers(5, 90), st.integers(5, 90), st.sampled_from([0.2, 1 / 3, 0.4, 0.8, 448 / 672, 1.25, 2.0]))
def test_scaled_sizes_are_those_of_torch(height, width, ratio) -> None:
    theirs = F.interpolate(torch.zeros(1, 1, height, width), scale_factor=ratio, mode="bilinear")
    assert scaled_size((height, width), ratio) == tuple(theirs.shape[-2:])


def bilinear(image: torch.Tensor, ratio: float) -> torch.Tensor:
    """(H, W), pixel by pixel: centres at (i + 0.5) / ratio - 0.5, neighbours outside repeat the border."""
    height, width = image.shape
    rescaled = torch.empty(int(height * ratio), int(width * ratio), dtype=image.dtype)
    for row in range(rescaled.shape[0]):
        for col in range(rescaled.shape[1]):
            y, x = (max((place + 0.5) / ratio - 0.5, 0) for place in (row, col))
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (left + 1 - x) + image[top, right] * (x - left)
            lower = image[below, left] * (left + 1 - x) + image[below, right] * (x - left)
            rescaled[row, col] = upper * (top + 1 - y) + lower * (y - top)
    return rescaled


@pytest.mark.parametrize("ratio", [0.4, 0.8, 1.5])
def test_pixels_are_mapped_by_the_ratio_even_where_a_side_was_rounded_down(ratio: float) -> None:
    image = torch.rand(1, 3, 13, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (view,) = image_pyramid(image, [ratio])
    for channel in range(3):
        torch.testing.assert_close(view[0, channel], bilinear(image[0, channel], ratio))


def test_the_branch_of_ratio_one_sees_the_image_itself() -> None:
    image = torch.zeros(1, 3, 8, 12)
    small, same = image_pyramid(image, [0.5, 1.0])
    assert same is image
    assert small.shape == (1, 3, 4, 6)


def test_an_image_too_small_for_a_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is left of 1x9"):
        image_pyramid(torch.zeros(1, 3, 1, 9), [0.5])


@pytest.mark.parametrize(("height", "width"), [(5, 8), (8, 5), (4, 8), (9, 2), (6, 6)])
def test_the_box_of_a_padded_view_is_where_the_square_lies_around_the_image(height: int, width: int) -> None:
    """Found in the square itself, whose padding is black and whose image is white."""
    geometry = PyramidGeometry(
        names=("one",), sides=(32,), strides=(16,), framing="pad", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    square = pad_to_square(Image.new("RGB", (width, height), "white"), (0, 0, 0))
    left, top, _, _ = square.getbbox()
    (view,) = geometry.layout((height, width)).views
    assert view.box == (-left, -top, square.width - left, square.height - top)


@pytest.mark.parametrize(("height", "width", "box"), [(5, 8, (1, 0, 6, 5)), (8, 5, (0, 1, 5, 6))])
def test_the_box_of_a_cropped_view_is_the_middle_square(
    height: int, width: int, box: tuple[int, ...]
) -> None:
    geometry = PyramidGeometry(
        names=("one",), sides=(32,), strides=(16,), framing="crop", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    assert geometry.layout((height, width)).views[0].box == box
