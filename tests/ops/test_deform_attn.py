"""Deformable attention: both paths against a definition worked out by hand, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from stepwell.ops.choose import prefer
from stepwell.ops.deform_attn import deform_attn, deform_attn_fast, deform_attn_reference

SIZES = [(5, 7), (1, 9), (9, 1), (1, 1), (4, 4)]


def make_inputs(size, *, batch=2, queries=11, heads=3, dim=5, points=4, dtype=torch.float32):
    value = torch.randn(batch, size[0] * size[1], heads, dim, dtype=dtype)
    locations = torch.rand(batch, queries, heads, points, 2, dtype=dtype) * 2 - 0.5  # some outside the map
    weights = torch.randn(batch, queries, heads, points, dtype=dtype)
    return value, locations, weights


def by_hand(value, size, locations, weights):
    batch, _, heads, dim = value.shape
    out = torch.zeros(batch, locations.shape[1], heads, dim, dtype=value.dtype)
    for b, q, m, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        x, y = (locations[b, q, m, p] * torch.tensor([size[1], size[0]]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for col in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < size[0] and 0 <= col < size[1]:
                    near = (1 - abs(y - row)) * (1 - abs(x - col))
                    out[b, q, m] += weights[b, q, m, p] * near * value[b, row * size[1] + col, m]
    return out.flatten(2)


@pytest.mark.parametrize("run", [deform_attn_reference, deform_attn_fast])
@pytest.mark.parametrize("size", SIZES)
def test_equals_four_corners_summed_by_hand(run, size):
    value, locations, weights = make_inputs(size, dtype=torch.float64)
    torch.testing.assert_close(run(value, size, locations, weights), by_hand(value, size, locations, weights))


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("size", [(3, 4), (1, 5)])
def test_gradients_of_value_locations_and_weights_are_numeric_ones(path, size):
    value, locations, weights = make_inputs(size, queries=3, heads=2, dim=3, points=2, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    with prefer(path):
        assert gradcheck(lambda v, at, w: deform_attn(v, size, at, w), inputs)


@pytest.mark.parametrize("size", SIZES)
def test_fast_gradients_equal_reference_gradients(size):
    inputs = make_inputs(size, queries=40)
    results = []
    for run in (deform_attn_reference, deform_attn_fast):
        value, locations, weights = (t.clone().requires_grad_() for t in inputs)
        out = run(value, size, locations, weights)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, value.grad, locations.grad, weights.grad))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-4, atol=1e-5)


def test_frozen_value_still_gives_gradients_to_locations_and_weights():
    value, locations, weights = make_inputs((3, 4))
    locations.requires_grad_(), weights.requires_grad_()
    deform_attn_fast(value, (3, 4), locations, weights).sum().backward()
    assert locations.grad.abs().sum() > 0
    assert weights.grad.abs().sum() > 0


def test_strided_inputs_give_what_contiguous_ones_give():
    value, locations, weights = make_inputs((3, 4))
    strided = value.transpose(1, 3).contiguous().transpose(1, 3)
    flipped = weights.transpose(1, 2).contiguous().transpose(1, 2)
    for run in (deform_attn_reference, deform_attn_fast):
        expected = run(value, (3, 4), locations, weights)
        torch.testing.assert_close(run(strided, (3, 4), locations, flipped), expected)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sampled_in_full_and_rounded_once(path, dtype):
    value, locations, weights = make_inputs((5, 7))
    value = value.to(dtype)
    with prefer(path):
        out = deform_attn(value, (5, 7), locations, weights)  # under autocast, a softmax leaves fp32 weights
        exact = deform_attn(value.float(), (5, 7), locations, weights)
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))


def test_gradient_of_half_precision_value_is_as_good_as_rounding_allows():
    value, locations, weights = make_inputs((2, 2), queries=500)
    half = value.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    deform_attn(half, (2, 2), locations, weights).float().sum().backward()
    deform_attn(full, (2, 2), locations, weights).sum().backward()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=2**-7, atol=1e-3)


def test_points_that_are_not_numbers_read_nothing():
    value, locations, weights = make_inputs((3, 4))
    locations[0, 0] = torch.nan
    locations[0, 1] = torch.inf
    out = deform_attn_fast(value, (3, 4), locations, weights)
    assert out[0, :2].eq(0).all()
    torch.testing.assert_close(out[:, 2:], deform_attn_reference(value, (3, 4), locations, weights)[:, 2:])


def test_compiles_without_graph_breaks_forward_and_backward():
    value, locations, weights = (t.requires_grad_() for t in make_inputs((3, 4)))
    compiled = torch.compile(deform_attn, fullgraph=True, backend="aot_eager")
    expected = deform_attn(value, (3, 4), locations, weights)
    out = compiled(value, (3, 4), locations, weights)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), (value, locations, weights)),
        torch.autograd.grad(expected.square().sum(), (value, locations, weights)),
    )


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_meta_tensors_pass_through(path):
    value, locations, weights = (t.to("meta") for t in make_inputs((3, 4)))
    with prefer(path):
        assert deform_attn(value, (3, 4), locations, weights).shape == (2, 11, 15)


def test_a_grid_that_does_not_fit_the_tokens_is_refused():
    value, locations, weights = make_inputs((3, 4))
    with pytest.raises(ValueError, match="12 tokens, but a grid of 4x4"):
        deform_attn(value, (4, 4), locations, weights)
