"""Arrays and tensors are the images that their numbers mean, whichever axis holds the colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_files import GREY, half_transparent, scene
from PIL import Image

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.images.open import image_size, open_image

COLOURS = np.asarray(scene())
VEILED = half_transparent().resize((10, 6), Image.Resampling.NEAREST)
CLEAR = np.asarray(VEILED)
EXACT = COLOURS.astype(np.float32) / 255


def pixels(source: Any) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    assert image_size(source) == (image.height, image.width)
    return np.asarray(image)


class Foreign:
    """An array of another library."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return COLOURS


ALIKE: dict[str, Any] = {
    "array": COLOURS,
    "channels first": COLOURS.transpose(2, 0, 1),
    "mirrored twice": np.ascontiguousarray(COLOURS[::-1, ::-1])[::-1, ::-1],
    "uint16": COLOURS.astype(np.uint16) * 257,
    "uint16, big-endian": COLOURS.astype(">u2") * 257,
    "uint16, not quite": COLOURS.astype(np.uint16) * 256 + 128,
    "float16": EXACT.astype(np.float16),
    "float32": EXACT,
    "float64": COLOURS / 255,
    "floats of a resize": (COLOURS + np.where(COLOURS > 127, 0.4, -0.4)) / 255,
    "another library's": Foreign(),
    "tensor": torch.from_numpy(COLOURS.copy()).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy(COLOURS.copy()),
    "tensor of floats": torch.from_numpy(EXACT).permute(2, 0, 1),
    "tensor with a gradient": torch.nn.Parameter(torch.from_numpy(EXACT).permute(2, 0, 1)),
    "float64 tensor": torch.from_numpy(COLOURS / 255),
    "uint16 tensor": torch.from_numpy(COLOURS.astype(np.uint16) * 257),
    "opaque": np.dstack([COLOURS, np.full(COLOURS.shape[:2], 255, np.uint8)]),
}


@pytest.mark.parametrize("name", ALIKE)
def test_arrays_and_tensors_of_every_kind_are_the_same_image(name: str) -> None:
    assert (pixels(ALIKE[name]) == COLOURS).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_it_can_be(dtype: torch.dtype) -> None:
    shown = pixels(torch.from_numpy(EXACT).to(dtype)).astype(int)
    assert np.abs(shown - COLOURS).max() <= 1


@pytest.mark.cuda
def test_a_tensor_may_be_anywhere() -> None:
    tensor = torch.from_numpy(EXACT).permute(2, 0, 1).cuda().requires_grad_()
    assert (pixels(tensor) == COLOURS).all()


@pytest.mark.parametrize("grey", [GREY, GREY[..., None], GREY[None], torch.from_numpy(GREY), GREY / 255])
def test_one_channel_is_grey_with_or_without_an_axis(grey: Any) -> None:
    assert (pixels(grey) == GREY[..., None]).all()


def test_bool_is_black_and_white() -> None:
    for line in (np.array([[True, False]]), torch.tensor([[True, False]])):
        assert pixels(line).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize(
    "clear", [CLEAR, CLEAR.transpose(2, 0, 1), CLEAR / 255, torch.from_numpy(CLEAR.copy())]
)
def test_a_fourth_channel_is_laid_over_white(clear: Any) -> None:
    assert (pixels(clear) == np.asarray(open_image(VEILED))).all()


@pytest.mark.parametrize(
    ("shape", "of_array", "of_tensor"),
    [
        ((3, 5, 4), (3, 5), (5, 4)),
        ((1, 9000, 3), (1, 9000), (9000, 3)),
        ((4, 3, 3), (4, 3), (3, 3)),
        ((3, 4, 5), (4, 5), (4, 5)),
        ((5, 4, 3), (5, 4), (5, 4)),
    ],
)
def test_where_both_axes_could_be_colours_an_array_has_them_last_and_a_tensor_first(
    shape: tuple[int, ...], of_array: tuple[int, int], of_tensor: tuple[int, int]
) -> None:
    assert pixels(np.zeros(shape, np.uint8)).shape[:2] == of_array
    assert pixels(torch.zeros(shape, dtype=torch.uint8)).shape[:2] == of_tensor


@pytest.mark.parametrize(
    "shape", [(), (4,), (2, 2, 2), (5, 6, 7), (1, 3, 4, 4), (0, 5), (5, 0, 3), (3, 0, 5), (0, 0), (0,)]
)
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_shapes_that_are_no_images_are_refused(shape: tuple[int, ...], make: Any) -> None:
    for look in (open_image, image_size):
        with pytest.raises(ImageError, match=r"the array of one image is \(H, W\)") as refusal:
            look(make(shape))
        assert str(refusal.value).endswith(f"got {shape}")


NORMALISED = (EXACT - 0.45) / 0.22
VALUES: dict[str, tuple[Any, str]] = {
    "0 to 255": (COLOURS.astype(np.float32), "got 1 to 250; undo"),
    "normalised": (NORMALISED, "got -2.*; undo"),
    "normalised tensor": (torch.from_numpy(NORMALISED), "got -2.*; undo"),
    "just over": (np.full((2, 2), 256 / 255), "got 1.00392 to 1.00392"),
    "just under": (np.full((2, 2), -1 / 255), "got -0.0039"),
    "huge": (np.full((2, 2), 1e300), "got 1e"),
    "not a number": (np.array([[0.5, np.nan]]), "got nan to nan"),
    "infinite": (np.array([[0.5, np.inf]]), "got 0.5 to inf"),
    "int64": (COLOURS.astype(np.int64), "got int64; convert it to uint8"),
    "int64 tensor": (torch.zeros(3, 4, 4, dtype=torch.int64), "got int64; convert"),
    "int8": (np.zeros((4, 4), np.int8), "got int8"),
    "uint32": (np.zeros((4, 4), np.uint32), "got uint32"),
    "complex": (np.zeros((4, 4), complex), "got complex128"),
    "objects": (np.full((4, 4), None), "got object"),
    "words": (np.full((4, 4), "a.png"), "got <U5"),
    "nowhere": (torch.zeros(3, 4, 4, device="meta"), "cannot be read as an array"),
    "sparse": (torch.zeros(4, 4).to_sparse(), "cannot be read as an array"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", VALUES)
def test_numbers_that_mean_no_grey_are_refused_in_one_line(name: str) -> None:
    source, says = VALUES[name]
    with pytest.raises(ImageError, match=says) as refusal:
        open_image(source)
    assert str(refusal.value).isprintable()


def test_what_is_in_memory_already_is_held_to_no_limit() -> None:
    tight = ImageLimits(max_bytes=1, max_pixels=1, max_side=1, max_aspect=1)
    for source in (COLOURS, torch.from_numpy(COLOURS.copy()), scene()):
        assert (np.asarray(open_image(source, limits=tight)) == COLOURS).all()
        assert image_size(source, limits=tight) == COLOURS.shape[:2]
    for line in (np.zeros((1, 9000), np.uint8), Image.new("L", (9000, 1))):
        assert pixels(line).shape == (1, 9000, 3)
