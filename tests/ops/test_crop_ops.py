"""Crops are the slices that the paper writes, and put together again they are what was cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stepwell.ops.crops import merge_blocks, merge_strides, middle, split_blocks, split_strides

SIDE = st.integers(1, 5)


@given(grid=st.tuples(SIDE, SIDE), crop=st.tuples(SIDE, SIDE))
def test_crops_are_the_papers_slices_and_merging_undoes_them(grid, crop):
    (rows, cols), (height, width) = grid, crop
    x = torch.arange(2 * rows * height * cols * width * 3).view(2, rows * height, cols * width, 3)
    blocks, strides = split_blocks(x, grid), split_strides(x, grid)
    for k in range(rows * cols):
        i, j = divmod(k, cols)
        block = x[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
        assert torch.equal(blocks[:, k], block)
        assert torch.equal(strides[:, k], x[:, i::rows, j::cols])
    assert torch.equal(merge_blocks(blocks, grid), x)
    assert torch.equal(merge_strides(strides, grid), x)


@pytest.mark.parametrize("split", [split_blocks, split_strides])
@pytest.mark.parametrize("size", [(7, 6), (6, 7)])
def test_sides_that_do_not_divide_are_refused(split, size):
    with pytest.raises(ValueError, match="does not divide into 2x3 crops"):
        split(torch.zeros(1, *size, 1), (2, 3))


@pytest.mark.parametrize("count", range(1, 10))
def test_the_middle_is_what_a_bilinear_resize_reads(count):
    x = torch.zeros(1, 1, 4 * count, requires_grad=True)
    F.interpolate(x, 4, mode="linear", align_corners=False).sum().backward()
    read = {int(cell) % count for cell in x.grad[0, 0].nonzero()}
    assert read == set(middle(count))
