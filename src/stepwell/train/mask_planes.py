"""Masks of an image's objects while it is resized, cut and flipped: eight to a byte, so that hundreds of them
cost little more than one. What moves pixels without mixing them takes planes for masks.

Letters: n objects, (H, W) the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepwell.data.masks import Numbers
from stepwell.structures import Size

__all__ = ["pack_masks", "unpack_masks"]

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


def unpack_masks(planes: Tensor, numbers: Sequence[int]) -> Tensor:
    """(n / 8 rounded up, H, W) uint8 -> those of these numbers (len(numbers), H, W), 1 on the object."""
    masks = planes.new_empty(len(numbers), *planes.shape[1:])
    for mask, number in zip(masks, numbers, strict=True):
        torch.bitwise_right_shift(planes[number // _BITS], number % _BITS, out=mask).bitwise_and_(1)
    return masks
