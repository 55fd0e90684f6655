"""Masks in bit planes: what goes in comes out, also resized by nearest pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepwell.data.masks import encode_mask, mask_spans
from stepwell.train.mask_planes import pack_masks, select_masks, unpack_masks

SIZE = (9, 13)


def random_masks(count):
    return list(np.random.default_rng(count).random((count, *SIZE)) > 0.5)


def packed(masks):
    return pack_masks([mask_spans(encode_mask(mask), SIZE) for mask in masks], SIZE)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_masks_come_back_from_planes(count):
    masks = random_masks(count)
    planes = packed(masks)
    assert planes.shape == (-(-count // 8), *SIZE)
    assert planes.dtype == torch.uint8
    back = unpack_masks(planes, count)
    assert back.shape == (count, *SIZE)
    assert back.tolist() == [mask.astype(int).tolist() for mask in masks]


@pytest.mark.parametrize("numbers", [[], [8], [39, 0, 7, 8], list(range(40))[::-3], list(range(40))])
def test_some_masks_are_taken_in_the_order_wanted(numbers):
    planes = packed(random_masks(40))
    chosen = select_masks(planes, numbers)
    assert chosen.shape == (-(-len(numbers) // 8), *SIZE)
    assert torch.equal(unpack_masks(chosen, len(numbers)), unpack_masks(planes, 40)[numbers])


def test_planes_are_resized_as_masks_are():
    masks = random_masks(11)
    resized = F.interpolate(packed(masks)[None], size=(14, 8))[0]
    expected = F.interpolate(torch.from_numpy(np.stack(masks)).to(torch.uint8)[None], size=(14, 8))[0]
    assert torch.equal(unpack_masks(resized, 11), expected)
