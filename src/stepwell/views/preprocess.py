"""A picture -> the normalised tensor an encoder was trained on.

Pillow's bicubic filter on 8-bit values (antialiased where it shrinks), as the processors of CLIP and ImageNet
models do, then scaling to 0..1, mean and deviation. LLaVA (arXiv 2310.03744) first pads to a square.
Sizes are (height, width); colours and statistics are red, green, blue.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepwell.structures import Size

__all__ = ["pad_to_square", "resize_short_side_and_crop", "to_tensor"]


def to_tensor(image: Image.Image, size: Size, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB picture -> (3, *size) float32: the picture at that size, as (value / 255 - mean) / std."""
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return pixels.div_(255).sub_(shift).div_(scale).contiguous()


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its long side, an odd pixel at the bottom or the right."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def resize_short_side_and_crop(image: Image.Image, side: int) -> Image.Image:
    """-> (side, side): the short side resized to it, the long one rounded down, the middle cut out."""
    short = min(image.size)
    width, height = (side * length // short for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + side, top + side))
