"""Images for detectors and segmenters: sizes that keep the ratio of the sides, resizing, padding.

MMDetection's and MMSegmentation's test pipelines as PIIP (arXiv 2501.07783) sets them: bilinear resizing of
8-bit values without antialiasing as OpenCV does, normalisation, and zeros at the right and the bottom after
it. Statistics are of pixels in 0..1; boxes are xyxy in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stepwell.structures import Extent, Size

__all__ = [
    "boxes_in",
    "pad_batch",
    "padded_size",
    "prepare_image",
    "resize_bilinear",
    "scale_factors",
    "size_of_short_side",
    "size_within",
]


def size_within(size: Size, limits: tuple[float, float]) -> Size:
    """The largest size of the same ratio whose long and short sides keep to the two limits, in either order.

    Images grow as well as shrink; sides are rounded, half a pixel up.
    """
    scale = min(max(limits) / max(size), min(limits) / min(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def size_of_short_side(size: Size, short: int) -> Size:
    """The size of the same ratio with that short side; the long one has no limit."""
    height, width = size
    long = short * (height / width if height > width else width / height)
    return size_within(size, (long, short))


def padded_size(size: Size, divisor: int, smallest: int = 1) -> Size:
    """Both sides up to a multiple of the divisor, of at least `smallest` pixels."""
    height, width = (-(-max(side, smallest) // divisor) * divisor for side in size)
    return height, width


def scale_factors(size: Size, resized: Size) -> tuple[float, float]:
    """Of width and height, by the rounded sizes: they differ a little."""
    return resized[1] / size[1], resized[0] / size[0]


def boxes_in(boxes: Tensor, size: Size, other: Size) -> Tensor:
    """Boxes (..., 4) in an image of `size` -> the same in one of the `other` size, clipped to it."""
    width, height = scale_factors(size, other)
    scaled = boxes * boxes.new_tensor([width, height, width, height])
    return scaled.clamp(min=0).minimum(boxes.new_tensor([other[1], other[0]] * 2))


def prepare_image(
    image: Image.Image | Tensor, size: Size, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """RGB image, or its uint8 tensor (3, H, W) -> (3, *size) float32, resized, as (value / 255 - mean) / std.

    Raises ValueError for a tensor of another shape or type.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"an image is uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    shift, scale = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (mean, std))
    pixels = resize_bilinear(image, size).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.sub_(255 * shift).div_(255 * scale)


def resize_bilinear(image: Tensor, size: Size) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, *size), at most one level from OpenCV's."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def pad_batch(images: Sequence[Tensor], divisor: int = 1) -> tuple[Tensor, list[Extent]]:
    """Normalised images (3, h, w) -> (B, 3, H, W), zeros at the right and the bottom, and where each lies.

    Every image is padded to multiples of the divisor, and further to the largest of them.
    """
    valid = [(image.shape[-2], image.shape[-1]) for image in images]
    extents = [Extent(size, padded_size(size, divisor)) for size in valid]
    height, width = (max(sides) for sides in zip(*(extent.padded for extent in extents), strict=True))
    batch = images[0].new_zeros(len(images), *images[0].shape[:-2], height, width)
    for place, image, (rows, cols) in zip(batch, images, valid, strict=True):
        place[..., :rows, :cols] = image
    return batch, extents
