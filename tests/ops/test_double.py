"""Doubling by a matrix product is the transposed convolution of torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stepwell.ops import double
from stepwell.ops.choose import prefer
from stepwell.ops.double import Doubled, double_map, finished, project


def inputs(dtype: torch.dtype, *, strided: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 5, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if strided else x
    return x, torch.randn(6, 4, 2, 2, dtype=dtype), torch.randn(4, dtype=dtype)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_fast_equals_conv_transpose(strided, grad):
    x, weight, bias = inputs(torch.float64, strided=strided)
    with prefer("fast"), torch.set_grad_enabled(grad):
        out = double_map(x, weight, bias)
    torch.testing.assert_close(out, F.conv_transpose2d(x, weight, bias, stride=2))


def test_gradients_of_both_paths_agree():
    grads = {}
    for path in ("reference", "fast"):
        leaves = [tensor.requires_grad_() for tensor in inputs(torch.float64)]
        with prefer(path):
            double_map(*leaves).square().sum().backward()
        grads[path] = [leaf.grad for leaf in leaves]
    for ours, theirs in zip(grads["fast"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_stays_half():
    with prefer("fast"), torch.no_grad():
        out = double_map(*inputs(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    expected = double_map(*(tensor.bfloat16().float() for tensor in inputs(torch.bfloat16)))
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_no_images_give_no_maps(path):
    _, weight, bias = inputs(torch.float32)
    with prefer(path):
        assert double_map(torch.zeros(0, 6, 3, 5), weight, bias).shape == (0, 4, 6, 10)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_second_derivatives_are_numeric_ones(path):
    with prefer(path):
        assert torch.autograd.gradgradcheck(double_map, [t.requires_grad_() for t in inputs(torch.float64)])


def test_under_autocast_both_paths_give_one_dtype_and_the_same_values():
    outs = []
    for path in ("reference", "fast"):
        with prefer(path), torch.autocast("cpu", torch.bfloat16):
            outs.append(double_map(*inputs(torch.float32)))
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outs[1], outs[0], rtol=2**-6, atol=2**-6)


def test_a_map_of_many_parts_is_the_transposed_convolution(monkeypatch):
    """Each part is some lines of every map, and one line at least."""
    x, (_, weight, bias) = torch.randn(2, 6, 40, 64), inputs(torch.float32)
    parts = []
    linear = double.linear
    monkeypatch.setattr(
        double, "linear", lambda lines, *rest: parts.append(lines.shape) or linear(lines, *rest)
    )
    for width in (64, 2000):
        x = torch.randn(2, 6, 9, width)
        with prefer("fast"), torch.no_grad():
            out = double_map(x, weight, bias)
        torch.testing.assert_close(out, F.conv_transpose2d(x, weight, bias, stride=2))
    assert {shape[1] for shape in parts} == {8, 1}
    assert max(shape[0] * shape[1] * shape[2] for shape in parts[:2]) <= double.MOST_CELLS


def pending(dtype=torch.float64, size=(3, 5)) -> tuple[Doubled, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((2, 6, *size), (6, 4, 2, 2), (4,)))
    return Doubled(x, weight, bias), torch.randn(3, 4, 1, 1, dtype=dtype), torch.randn(3, dtype=dtype)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_doubling_and_a_projection_are_joined_to_the_same_values_and_gradients(
    monkeypatch, path, with_bias
):
    monkeypatch.setattr(double, "FEWEST_SAVED", 0)
    doubled, weight, bias = pending()
    leaves = [doubled.x, doubled.weight, doubled.bias, weight, *([bias] if with_bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    bias = bias if with_bias else None
    expected = F.conv2d(F.conv_transpose2d(*leaves[:3], stride=2), weight, bias)
    with prefer(path):
        out = project(doubled, weight, bias)
    torch.testing.assert_close(out, expected)
    grads = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grads), torch.autograd.grad(expected, leaves, grads), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("path", "size", "is_joined"),
    [("auto", (3, 5), True), ("auto", (1, 1), False), ("reference", (3, 5), False)],
)
def test_the_wide_map_is_made_where_joining_would_cost_more(monkeypatch, path, size, is_joined):
    """2 images of 3x5 cells save 30 * (24 + 12 - 18) products and cost 72; of one cell, 36."""
    shapes = []
    monkeypatch.setattr(double, "FEWEST_SAVED", 0)
    monkeypatch.setattr(
        double,
        "double_map",
        lambda x, weight, bias: shapes.append(weight.shape) or double_map(x, weight, bias),
    )
    doubled, weight, bias = pending(size=size)
    with prefer(path):
        project(doubled, weight, bias)
    assert shapes == [(6, 3, 2, 2) if is_joined else (6, 4, 2, 2)]


def test_a_pending_map_looks_like_the_map():
    doubled, _, _ = pending()
    assert doubled.shape == finished(doubled).shape == (2, 4, 6, 10)
    assert len(doubled) == 2
    single = doubled.to(torch.float32)
    assert {x.dtype for x in (single.x, single.weight, single.bias, finished(single))} == {torch.float32}
    assert torch.equal(finished(doubled), double_map(doubled.x, doubled.weight, doubled.bias))
    assert finished(doubled.x) is doubled.x
