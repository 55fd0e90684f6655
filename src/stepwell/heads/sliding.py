"""An image seen through a window that slides over it, and the class of every pixel of the original.

MMSegmentation's test of PIIP's segmenters (arXiv 2501.07783): logits of overlapping windows are averaged,
resized to the original image's size, and the largest is taken.
Letters: B batch, K classes, (H, W) the size of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepwell.ops.precision import at_least_single
from stepwell.ops.resize import resize_map
from stepwell.ops.sliding_windows import windows
from stepwell.structures import Size

__all__ = ["class_map", "slide"]

MOST_VALUES = 2**26  # of logits that are resized at a time


def slide(
    run: Callable[[Tensor], Tensor], image: Tensor, *, crop: Size, stride: Size, most: int = 4
) -> Tensor:
    """Logits (B, K, H, W) of an image (B, 3, H, W): the mean over the windows that see a pixel.

    run: (b, 3, h, w) -> logits (b, K, h, w) of windows, at most `most` at a time, which are alike in size.
    Averaged in single precision at least. Raises ValueError for logits of another size than the window.
    """
    seen = windows((image.shape[-2], image.shape[-1]), crop, stride)
    places = [(i, window) for i in range(len(image)) for window in seen]
    count = image.new_zeros(image.shape[-2:], dtype=torch.float32)
    for top, left, bottom, right in seen:
        count[top:bottom, left:right] += 1
    total: Tensor | None = None
    for first in range(0, len(places), most):
        part = places[first : first + most]
        views = torch.stack([image[i, :, w.top : w.bottom, w.left : w.right] for i, w in part])
        logits = run(views)
        if logits.shape[-2:] != views.shape[-2:]:
            raise ValueError(
                f"logits of a window are as large as the window, {tuple(views.shape[-2:])}, "
                f"got {tuple(logits.shape[-2:])}"
            )
        if total is None:
            dtype = at_least_single(logits.dtype)
            total = logits.new_zeros((len(image), logits.shape[1], *image.shape[-2:]), dtype=dtype)
        for (i, w), values in zip(part, logits, strict=True):
            total[i, :, w.top : w.bottom, w.left : w.right] += values
    if total is None:
        raise ValueError("there is no image to slide a window over; give a batch of at least one")
    return total / count


def class_map(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, K, h, w), resized to `size`, -> the class (B, *size) of every pixel, int64.

    A few classes are resized at a time: all classes of a big image would take gigabytes. The softmax that
    MMSegmentation takes in between changes no order.
    """
    height, width = size
    together = max(1, MOST_VALUES // (len(logits) * height * width))
    best: Tensor | None = None
    for first in range(0, logits.shape[1], together):
        part = logits[:, first : first + together]
        value, index = resize_map(part.to(at_least_single(part.dtype)), (height, width)).max(1)
        if best is None:
            best, classes = value, index
        else:
            classes = torch.where(value > best, index + first, classes)
            best = torch.maximum(value, best)
    if best is None:
        raise ValueError("logits need at least one class")
    return classes
