"""Tensors equal those of the processors the encoders were trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from stepwell.views import preprocess
from stepwell.views.preprocess import pad_and_resize, pad_to_square, resize_short_side_and_crop, to_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = InterpolationMode.BICUBIC


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(20, 30), (40, 60), (7, 91), (81, 5)])
def test_tensors_are_those_of_torchvision(size: tuple[int, int]) -> None:
    image = noise(40, 60)
    resized = tv.resize(image, list(size), BICUBIC)
    expected = tv.normalize(tv.to_tensor(resized), MEAN, STD)
    tensor = to_tensor(image, size, MEAN, STD)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, expected)


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    image = noise(5, 4)
    tensor = to_tensor(image, (5, 4), (0.0,) * 3, (1 / 255,) * 3)
    torch.testing.assert_close(tensor.permute(1, 2, 0), torch.from_numpy(np.array(image)).float())


@given(st.integers(1, 40), st.integers(1, 40))
def test_padding_centres_the_image_and_gives_the_odd_pixel_to_the_end(height: int, width: int) -> None:
    image, side = noise(height, width), max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padding = ((top, side - height - top), (left, side - width - left))
    channels = [
        np.pad(channel, padding, constant_values=value)
        for channel, value in zip(np.asarray(image).transpose(2, 0, 1), (122, 116, 104), strict=True)
    ]
    assert (np.asarray(pad_to_square(image, (122, 116, 104))) == np.stack(channels, axis=2)).all()


@pytest.mark.parametrize(("height", "width"), [(90, 140), (140, 90), (57, 40), (64, 64), (33, 34)])
def test_short_side_and_crop_are_those_of_torchvision(height: int, width: int) -> None:
    image = noise(height, width)
    resized = tv.resize(image, [64], BICUBIC)
    left, top = (resized.width - 64) // 2, (resized.height - 64) // 2
    expected = np.asarray(resized)[top : top + 64, left : left + 64]
    assert (np.asarray(resize_short_side_and_crop(image, 64)) == expected).all()


LENGTH = st.integers(1, 60)


@pytest.mark.parametrize("band_pixels", [1, 300, 2**21])
def test_padding_and_resizing_at_once_is_doing_one_after_the_other(
    band_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "BAND_PIXELS", band_pixels)

    @given(LENGTH, LENGTH, LENGTH)
    def agree(height: int, width: int, side: int) -> None:
        image, colour = noise(height, width), (122, 116, 104)
        expected = pad_to_square(image, colour).resize((side, side), Image.Resampling.BICUBIC)
        assert (np.asarray(pad_and_resize(image, colour, side)) == np.asarray(expected)).all()

    agree()


@pytest.mark.parametrize("band_pixels", [1, 300, 2**21])
@pytest.mark.parametrize("filter", [Image.Resampling.BICUBIC, Image.Resampling.NEAREST])
def test_only_the_middle_of_a_resized_picture_is_made_and_is_the_same(
    filter: Image.Resampling, band_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "BAND_PIXELS", band_pixels)

    @given(LENGTH, LENGTH, st.integers(1, 40))
    def agree(height: int, width: int, side: int) -> None:
        image, short = noise(height, width), min(height, width)
        resized = image.resize((side * width // short, side * height // short), filter)
        left, top = (resized.width - side) // 2, (resized.height - side) // 2
        expected = resized.crop((left, top, left + side, top + side))
        assert (np.asarray(resize_short_side_and_crop(image, side, filter)) == np.asarray(expected)).all()

    agree()


@pytest.mark.parametrize("shape", [(16_384, 82), (82, 16_384), (200, 1), (1, 200)])
def test_no_long_image_becomes_a_huge_one_on_the_way(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, sizes = Image.new("RGB", shape), []
    new = Image.Image._new

    def seen(self: Image.Image, im: object) -> Image.Image:
        image = new(self, im)
        sizes.append(image.width * image.height)
        return image

    monkeypatch.setattr(Image.Image, "_new", seen)
    pad_and_resize(image, (0, 0, 0), 56)
    resize_short_side_and_crop(image, 224)
    assert max(sizes) < 8e6
