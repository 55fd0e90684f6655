"""Boxes: read from text, and their overlap as torchvision has it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_iou

from stepwell.evaluate.boxes import box_iou, read_box

SIDE = st.integers(0, 8)
BOXES = st.tuples(SIDE, SIDE, SIDE, SIDE).map(
    lambda box: (min(box[::2]), min(box[1::2]), max(box[::2]), max(box[1::2]))
)


@given(BOXES, BOXES)
def test_overlap_is_torchvisions(a, b):
    theirs = torchvision_iou(*(torch.tensor([box], dtype=torch.float64) for box in (a, b)))
    assert box_iou(a, b) == pytest.approx(theirs.nan_to_num(0).item())


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("It is [ 1,2 ,3, 4]", None),
        ("It is [ 1,2,3,\n4 ] or [5, 6, 7, 8].", (1, 2, 3, 4)),
        ("[-0.1, 0, 1, 1]", (-0.1, 0, 1, 1)),
        ("(0.1, 0.2, 0.5, 0.6)", None),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[.1, .2, .3, .4]", None),
    ],
)
def test_boxes_in_text(text, box):
    assert read_box(text) == box
