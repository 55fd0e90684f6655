"""A map pooled before it is projected gives the windows of the projected and normed map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from stepwell.ops import pooled_norm
from stepwell.ops.choose import prefer
from stepwell.ops.pooled_norm import norm_of_pooled, pool_for_norm
from stepwell.ops.window_pool import window_pool

GRID, BINS, EPS = (3, 2), (2, 3), 1e-3


def make_inputs(size=(7, 5), dim=6, out_dim=10, bias=3.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, dim, *size), (out_dim, dim), (out_dim,), (out_dim,), (out_dim,)]
    x, weight, shift, gain, offset = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes
    )
    return tuple(tensor.requires_grad_() for tensor in (x, weight, bias * shift, gain, offset))


def pooled_first(x, weight, bias, gain, shift):
    deviation, matrix = norm_of_pooled(weight, bias, gain, shift, eps=EPS)
    return F.linear(pool_for_norm(x, deviation, GRID, BINS, edges=x.dtype), matrix)


def projected_first(x, weight, bias, gain, shift):
    cells = F.layer_norm(F.linear(x.movedim(1, -1), weight, bias), gain.shape, gain, shift, EPS)
    return window_pool(cells.movedim(-1, 1), GRID, BINS)


@pytest.mark.parametrize("size", [(7, 5), (2, 1), (1, 9), (40, 3)])
@pytest.mark.parametrize("block", [4, 256])
def test_pooling_first_gives_the_same_and_so_do_its_gradients(size, block, monkeypatch):
    monkeypatch.setattr(pooled_norm, "BLOCK", block)
    inputs = make_inputs(size)
    got, wanted = pooled_first(*inputs), projected_first(*inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    grad = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_it_is_torchvisions_roi_align_of_torchs_layer_norm():
    x, weight, bias, gain, shift = make_inputs((6, 4))
    cells = F.layer_norm(F.linear(x.movedim(1, -1), weight, bias), gain.shape, gain, shift, EPS)
    boxes = torch.tensor([[2.0 * j, 2.0 * i, 2.0 * j + 2, 2.0 * i + 2] for i in range(3) for j in range(2)])
    wanted = roi_align(cells.movedim(-1, 1), [boxes.double()] * 2, BINS, aligned=False)
    wanted = wanted.flatten(2).transpose(1, 2).unflatten(0, (2, -1))
    torch.testing.assert_close(pooled_first(x, weight, bias, gain, shift), wanted, rtol=0, atol=1e-11)


def test_a_cell_that_the_bias_undoes_has_the_least_deviation():
    """Its square is the difference of numbers that are a million times larger."""
    _, weight, bias, gain, shift = (tensor.detach() for tensor in make_inputs(dim=10))
    weight, bias = torch.eye(10), 1000 * bias.float()
    deviation, _ = norm_of_pooled(weight, bias, gain.float(), shift.float(), eps=EPS)
    cells = -bias + 1e-3 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    assert deviation.of(cells).isfinite().all()
    assert deviation.of(cells).max() < bias.std() / 1000
    torch.testing.assert_close(deviation.of(0 * bias), bias.std(unbiased=False))


def test_parts_and_memory_order_do_not_matter(monkeypatch):
    monkeypatch.setattr(pooled_norm, "MOST", 6)
    inputs = [tensor.detach() for tensor in make_inputs()]
    with torch.no_grad():
        got = pooled_first(inputs[0].to(memory_format=torch.channels_last), *inputs[1:])
        with prefer("reference"):
            torch.testing.assert_close(got, pooled_first(*inputs), rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_single():
    inputs = [tensor.detach().bfloat16() for tensor in make_inputs()]
    exact = [tensor.double() for tensor in inputs]
    deviation, matrix = norm_of_pooled(*inputs[1:], eps=EPS)
    got = F.linear(pool_for_norm(inputs[0], deviation, GRID, BINS, edges=torch.float32), matrix)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), pooled_first(*exact), rtol=1e-4, atol=1e-4)
