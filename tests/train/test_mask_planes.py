"""Masks in bit planes: what goes in comes out, also resized by nearest pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepwell.data.masks import encode_mask, mask_spans
from stepwell.train.mask_planes import pack_masks, unpack_masks

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
    back = unpack_masks(planes, range(count))
    assert back.shape == (count, *SIZE)
    assert back.tolist() == [mask.astype(int).tolist() for mask in masks]
    assert unpack_masks(planes, range(count)[::-3]).tolist() == back.tolist()[::-3]


def test_planes_are_resized_as_masks_are():
    masks = random_masks(11)
    resized = F.interpolate(packed(masks)[None], size=(14, 8))[0]
    expected = F.interpolate(torch.from_numpy(np.stack(masks)).to(torch.uint8)[None], size=(14, 8))[0]
    assert torch.equal(unpack_masks(resized, range(11)), expected)
