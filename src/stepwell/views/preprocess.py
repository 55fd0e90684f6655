"""An image -> the normalised tensor an encoder was trained on.

Pillow's bicubic filter on 8-bit values (antialiased where it shrinks), as the processors of CLIP and ImageNet
models do, then scaling to 0..1, mean and deviation. LLaVA (arXiv 2310.03744) first pads to a square.
Sizes are (height, width); colours and statistics are red, green, blue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepwell.structures import Box, Size

__all__ = [
    "Square",
    "pad_and_resize",
    "pad_to_square",
    "resize_short_side_and_crop",
    "square_box",
    "squared",
    "to_tensor",
]

Square = Literal["pad", "crop", "squeeze"]
"""How an image meets a square view, or a grid of them: padded to a square; its short side resized, the middle
cut out; its aspect bent to the view's.
"""

BAND_PIXELS = 2**21  # of an intermediate image that is made in parts


def to_tensor(image: Image.Image, size: Size, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB image -> (3, *size) float32: the image at that size, as (value / 255 - mean) / std."""
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return pixels.div_(255).sub_(shift).div_(scale).contiguous()


def squared(image: Image.Image, how: Square, side: int, mean: Sequence[float]) -> Image.Image:
    """-> (side, side), padding in the colour of the mean; or as it is, to be bent when it is resized."""
    if how == "squeeze":
        return image
    if how == "crop":
        return resize_short_side_and_crop(image, side)
    red, green, blue = (int(255 * channel) for channel in mean)
    return pad_and_resize(image, (red, green, blue), side)


def square_box(size: Size, how: Square) -> Box:
    """What is seen, in the pixels of an image of `size`; an offset is rounded as `squared` rounds it."""
    height, width = size
    if how == "squeeze":
        return (0.0, 0.0, float(width), float(height))
    if how == "pad":
        side = max(size)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
    else:
        side = min(size)
        left, top = float((width - side) // 2), float((height - side) // 2)
    return (left, top, left + side, top + side)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of its long side, an odd pixel at the bottom or the right."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def pad_and_resize(image: Image.Image, colour: tuple[int, int, int], side: int) -> Image.Image:
    """-> (side, side): `pad_to_square` and then the bicubic resize, pixel for pixel, without the square.

    Pillow resizes the rows of a square first and then the columns. So only the image's own rows are
    resized, some at a time; all other rows of the square are one and the same.
    """
    (width, height), long = image.size, max(image.size)
    left, top = (long - width) // 2, (long - height) // 2
    empty = _resize(Image.new("RGB", (long, 1), colour), side, 1)
    tall = empty.resize((side, long), Image.Resampling.NEAREST)
    for first, rows in _bands(height, long):
        band = Image.new("RGB", (long, rows), colour)
        band.paste(image.crop((0, first, width, first + rows)), (left, 0))
        tall.paste(_resize(band, side, rows), (0, top + first))
    return _resize(tall, side, side)


def resize_short_side_and_crop(
    image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """-> (side, side): the short side resized to it, the long one rounded down, the middle cut out.

    An image that grows is made rows first and then columns, as Pillow does, some at a time: of a long one
    nearly all is cut away.
    """
    short = min(image.size)
    width, height = (side * length // short for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if short >= side:
        return _resize(image, width, height, resample).crop((left, top, left + side, top + side))
    middle = Image.new("RGB", (side, image.height))
    for first, rows in _bands(image.height, max(image.width, width)):
        band = image.crop((0, first, image.width, first + rows))
        middle.paste(_resize(band, width, rows, resample).crop((left, 0, left + side, rows)), (0, first))
    cut = Image.new("RGB", (side, side))
    for first, columns in _bands(side, max(image.height, height)):
        band = middle.crop((first, 0, first + columns, image.height))
        cut.paste(_resize(band, columns, height, resample).crop((0, top, columns, top + side)), (first, 0))
    return cut


def _resize(
    image: Image.Image, width: int, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    return image.resize((width, height), resample)


def _bands(count: int, length: int) -> Iterator[tuple[int, int]]:
    """The first line and the number of lines of each band, for `count` lines of `length` pixels."""
    lines = max(BAND_PIXELS // length, 1)
    return ((first, min(lines, count - first)) for first in range(0, count, lines))
