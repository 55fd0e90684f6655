"""Sizes and pixels of images for detectors and segmenters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD
from stepwell.views.resize import (
    boxes_in,
    pad_batch,
    padded_size,
    prepare_image,
    resize_bilinear,
    scale_factors,
    size_of_short_side,
    size_within,
)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (1333, 800), (800, 1067)),
        ((640, 480), (1333, 800), (1067, 800)),
        ((640, 480), (800, 1333), (1067, 800)),  # in either order
        ((333, 640), (1333, 800), (694, 1333)),
        ((1200, 2000), (1120, 672), (672, 1120)),
        ((1, 10_000), (1333, 800), (1, 1333)),
        ((30, 45), (1000, 15), (15, 23)),  # half a pixel up
    ],
)
def test_the_ratio_is_kept_within_both_limits(size, limits, expected):
    assert size_within(size, limits) == expected


side = st.integers(1, 5000)


@given(height=side, width=side, long=st.integers(32, 2400), short=st.integers(32, 1400))
def test_limits_are_met_and_one_of_them_is_reached(height, width, long, short):
    long, short = max(long, short), min(long, short)
    resized = size_within((height, width), (long, short))
    assert max(resized) <= long
    assert min(resized) <= short
    assert max(resized) == long or min(resized) == short


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((600, 450), (683, 512)),
        ((141, 1229), (512, 4463)),
        ((2000, 300), (3413, 512)),
        ((512, 512), (512, 512)),
    ],
)
def test_a_short_side_alone_has_no_long_limit(size, expected):
    assert size_of_short_side(size, 512) == expected


def test_sides_are_padded_up_to_multiples():
    assert padded_size((800, 1067), 32) == (800, 1088)
    assert padded_size((1, 225), 224) == (224, 448)
    assert padded_size((7, 9), 1) == (7, 9)


def test_boxes_follow_the_rounded_sizes_and_are_clipped():
    assert scale_factors((480, 640), (800, 1067)) == (1067 / 640, 800 / 480)
    boxes = torch.tensor([[64.0, 48.0, 320.0, 480.0], [-5.0, -5.0, 700.0, 600.0]], dtype=torch.float64)
    resized = boxes_in(boxes, (480, 640), (800, 1067))
    expected = torch.tensor([[106.7, 80.0, 533.5, 800.0], [0.0, 0.0, 1067.0, 800.0]], dtype=torch.float64)
    torch.testing.assert_close(resized, expected)
    torch.testing.assert_close(boxes_in(resized, (800, 1067), (480, 640))[0], boxes[0])


def test_pixels_between_centres_are_weighed_without_antialiasing():
    image = torch.tensor([0, 100, 200, 60], dtype=torch.uint8).expand(3, 1, 4)
    assert resize_bilinear(image, (1, 8))[0, 0].tolist() == [0, 25, 75, 125, 175, 165, 95, 60]
    striped = torch.tensor([0, 0, 240, 0, 0, 0] * 2, dtype=torch.uint8).expand(3, 1, 12)
    assert resize_bilinear(striped, (1, 4))[0, 0].tolist() == [0, 0, 0, 0]  # every third pixel alone is read


def test_growing_and_shrinking_stay_within_a_level_of_the_exact_value():
    image = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8)
    for size in ((50, 71), (20, 29), (37, 100)):
        exact = torch.nn.functional.interpolate(image[None].double(), size, mode="bilinear")[0]
        assert (resize_bilinear(image, size) - exact).abs().max() <= 1


def test_an_image_and_its_tensor_are_prepared_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    prepared = prepare_image(image, (45, 60), IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(prepared, prepare_image(tensor.contiguous(), (45, 60), IMAGENET_MEAN, IMAGENET_STD))
    assert (prepared.dtype, prepared.shape, prepared.is_contiguous()) == (torch.float32, (3, 45, 60), True)
    same = prepare_image(image, (30, 40), IMAGENET_MEAN, IMAGENET_STD)
    assert same.is_contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(same, (tensor / 255 - mean) / std)
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 4, 3, dtype=torch.uint8)],
)
def test_other_tensors_are_refused(wrong):
    with pytest.raises(ValueError, match=r"an image is uint8 \(3, H, W\)"):
        prepare_image(wrong, (8, 8), IMAGENET_MEAN, IMAGENET_STD)


def test_a_batch_is_padded_with_zeros_to_its_largest_image():
    images = [torch.ones(3, 5, 9), torch.full((3, 8, 3), 2.0)]
    batch, extents = pad_batch(images, 4)
    assert batch.shape == (2, 3, 8, 12)
    assert extents == [((5, 9), (8, 12)), ((8, 3), (8, 4))]
    assert torch.equal(batch[0, :, :5, :9], images[0])
    assert batch.sum() == sum(image.sum() for image in images)
    assert pad_batch(images)[0].shape == (2, 3, 8, 9)
