"""Pixels of inputs of any sizes in one tensor, and networks over tensors of any shapes."""

from __future__ import annotations

import pytest
import torch

from stepwell.ops.pack import pack, unpack
from stepwell.ops.ragged import by_shape

SIZES = [(4, 6), (1, 9), (5, 5), (4, 6)]


def test_unpacking_undoes_packing_without_a_copy() -> None:
    inputs = [torch.randn(3, *size) for size in SIZES]
    pixels = pack(inputs)
    assert pixels.shape == (24 + 9 + 25 + 24, 3)
    for image, again in zip(inputs, unpack(pixels, SIZES), strict=True):
        assert torch.equal(image, again)
        assert again.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr()
        assert again[None].is_contiguous(memory_format=torch.channels_last)


def test_a_row_is_a_pixel_in_reading_order() -> None:
    image = torch.arange(3 * 2 * 5).view(3, 2, 5)
    assert pack([image])[7].tolist() == image[:, 1, 2].tolist()


def test_pixels_that_the_sizes_do_not_account_for_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match=r"have 82 pixels, but pixel_values is \(81, 3\)"):
        unpack(torch.zeros(81, 3), SIZES)
    with pytest.raises(ValueError, match=r"\(82, 3, 1\)"):
        unpack(torch.zeros(82, 3, 1), SIZES)


def test_tensors_alike_in_shape_go_together_and_come_back_in_order() -> None:
    batches = []

    def run(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batches.append(tuple(batch.shape))
        return batch.sum((1, 2, 3)), batch * 2

    tensors = [torch.full((3, *size), float(i)) for i, size in enumerate(SIZES)]
    outputs = by_shape(run, tensors)
    assert sorted(batches) == [(1, 3, 1, 9), (1, 3, 5, 5), (2, 3, 4, 6)]
    for tensor, (total, double) in zip(tensors, outputs, strict=True):
        assert total == tensor.sum()
        assert torch.equal(double, 2 * tensor)


def test_gradients_go_back_to_every_tensor() -> None:
    tensors = [torch.randn(2, n, requires_grad=True) for n in (3, 4, 3)]
    sum(output.square().sum() for (output,) in by_shape(lambda x: [x * 3], tensors)).backward()
    for tensor in tensors:
        torch.testing.assert_close(tensor.grad, 18 * tensor)
