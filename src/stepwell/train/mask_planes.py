"""Masks of an image's objects while it is resized, cut and flipped: eight to a byte, so that hundreds of them
cost little more than one. What moves pixels without mixing them takes planes for masks.

Letters: n objects, (H, W) the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepwell.data.masks import Mask
from stepwell.structures import Size

__all__ = ["pack_masks", "unpack_masks"]

_BITS = 8


def pack_masks(masks: Sequence[Mask], size: Size) -> Tensor:
    """Each (H, W) = size -> (n / 8 rounded up, H, W) uint8: mask i is bit i % 8 of plane i // 8."""
    height, width = size
    # Masks come out of run lengths, which go down column by column.
    columns: np.ndarray[Any, Any] = np.zeros((-(-len(masks) // _BITS), width, height), dtype=np.uint8)
    for number, mask in enumerate(masks):
        columns[number // _BITS] |= mask.T.view(np.uint8) << (number % _BITS)
    return torch.from_numpy(columns).mT.contiguous()


def unpack_masks(planes: Tensor, count: int) -> Tensor:
    """(n / 8 rounded up, H, W) uint8 -> (count, H, W) uint8, 1 on the object; count is n."""
    numbers = torch.arange(count)
    return planes[numbers // _BITS] >> (numbers % _BITS).to(torch.uint8).view(-1, 1, 1) & 1
