"""Masks of an image's objects on their way from a file to the model: eight to a byte, so that hundreds cost
little more than one to be resized, cut, flipped, kept and sent. What moves pixels without mixing them takes
planes for masks.

Letters: n objects, (H, W) the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepwell.data.masks import Numbers
from stepwell.structures import Size

__all__ = ["pack_masks", "select_masks", "unpack_masks"]

_BITS = 8


def pack_masks(spans: Sequence[Numbers], size: Size) -> Tensor:
    """Runs of each mask (`mask_spans`) of an image of (H, W) = size -> (n / 8 rounded up, H, W) uint8: mask i
    is bit i % 8 of plane i // 8. Only pixels of objects are written.
    """
    height, width = size
    columns = np.zeros((-(-len(spans) // _BITS), width * height), dtype=np.uint8)
    for number, runs in enumerate(spans):
        plane, bit = columns[number // _BITS], np.uint8(1 << number % _BITS)
        for start, end in runs.tolist():
            plane[start:end] |= bit
    return torch.from_numpy(columns.reshape(-1, width, height)).mT.contiguous()


def select_masks(planes: Tensor, numbers: Sequence[int]) -> Tensor:
    """Planes of the masks of these numbers, in their order."""
    chosen = planes.new_zeros(-(-len(numbers) // _BITS), *planes.shape[1:])
    for place, number in enumerate(numbers):
        bit = planes[number // _BITS].bitwise_right_shift(number % _BITS).bitwise_and_(1)
        chosen[place // _BITS] |= bit.bitwise_left_shift_(place % _BITS)
    return chosen


def unpack_masks(planes: Tensor, count: int) -> Tensor:
    """(n / 8 rounded up, H, W) uint8 -> the first `count` masks (count, H, W), 1 on the object."""
    bits = torch.arange(_BITS, dtype=torch.uint8, device=planes.device)[:, None, None]
    return planes[:, None].bitwise_right_shift(bits).bitwise_and_(1).flatten(0, 1)[:count]
