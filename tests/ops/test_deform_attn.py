"""Deformable attention: both paths against a definition worked out by hand, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stepwell.ops.choose import prefer
from stepwell.ops.deform_attn import _read, deform_attn, deform_attn_fast, deform_attn_reference
from stepwell.ops.parts import MOST

SIZES = [(5, 7), (1, 9), (9, 1), (1, 1), (4, 4)]


def make_inputs(size, *, batch=2, queries=11, heads=3, dim=5, points=4, dtype=torch.float32):
    value = torch.randn(batch, size[0] * size[1], heads, dim, dtype=dtype)
    places = torch.rand(2, batch, queries, heads, points, dtype=dtype) * 2 - 0.5  # some outside the map
    weights = torch.randn(batch, queries, heads, points, dtype=dtype)
    return value, places[0] * size[1] - 0.5, places[1] * size[0] - 0.5, weights


def by_hand(value, size, columns, rows, weights):
    batch, _, heads, dim = value.shape
    out = torch.zeros(batch, weights.shape[1], heads, dim, dtype=value.dtype)
    for b, q, m, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        x, y = columns[b, q, m, p].item(), rows[b, q, m, p].item()
        for row in (math.floor(y), math.floor(y) + 1):
            for col in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < size[0] and 0 <= col < size[1]:
                    near = (1 - abs(y - row)) * (1 - abs(x - col))
                    out[b, q, m] += weights[b, q, m, p] * near * value[b, row * size[1] + col, m]
    return out.flatten(2)


@pytest.mark.parametrize("run", [deform_attn_reference, deform_attn_fast])
@pytest.mark.parametrize("size", SIZES)
def test_equals_four_corners_summed_by_hand(run, size):
    value, *places, weights = make_inputs(size, dtype=torch.float64)
    torch.testing.assert_close(run(value, [size], *places, weights), by_hand(value, size, *places, weights))


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("size", [(3, 4), (1, 5)])
def test_gradients_of_value_locations_and_weights_are_numeric_ones(path, size):
    inputs = make_inputs(size, queries=3, heads=2, dim=3, points=2, dtype=torch.float64)
    with prefer(path):
        assert gradcheck(
            lambda v, *points: deform_attn(v, [size], *points), [t.requires_grad_() for t in inputs]
        )


@pytest.mark.parametrize("size", SIZES)
def test_fast_gradients_equal_reference_gradients(size):
    inputs = make_inputs(size, queries=40)
    results = []
    for run in (deform_attn_reference, deform_attn_fast):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(leaves[0], [size], *leaves[1:])
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-4, atol=1e-5)


def test_many_queries_are_read_in_parts_to_the_same_result():
    value, *points = make_inputs((5, 7), queries=MOST // 2 + 3, heads=1, dim=2, points=1)
    with torch.no_grad():
        parted = deform_attn_fast(value, [(5, 7)], *points)
    torch.testing.assert_close(parted, deform_attn_reference(value, [(5, 7)], *points))


def test_frozen_value_still_gives_gradients_to_locations_and_weights():
    value, *points = make_inputs((3, 4))
    deform_attn_fast(value, [(3, 4)], *(t.requires_grad_() for t in points)).sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in points)


def test_strided_inputs_give_what_contiguous_ones_give():
    value, *points = make_inputs((3, 4))
    strided = value.transpose(1, 3).contiguous().transpose(1, 3)
    flipped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in points]
    for run in (deform_attn_reference, deform_attn_fast):
        torch.testing.assert_close(run(strided, [(3, 4)], *flipped), run(value, [(3, 4)], *points))


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sampled_in_full_and_rounded_once(path, dtype):
    value, *points = make_inputs((5, 7))
    value = value.to(dtype)
    with prefer(path):
        out = deform_attn(value, [(5, 7)], *points)  # under autocast, a softmax leaves fp32 weights
        exact = deform_attn(value.float(), [(5, 7)], *points)
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))


def test_gradient_of_half_precision_value_is_as_good_as_rounding_allows():
    value, *points = make_inputs((2, 2), queries=500)
    half = value.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    deform_attn(half, [(2, 2)], *points).float().sum().backward()
    deform_attn(full, [(2, 2)], *points).sum().backward()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_place_that_is_no_finite_number_gives_nan_and_only_there(path, bad, axis):
    value, *places, weights = make_inputs((3, 4))
    places[axis][0, 2, 1, 3] = bad
    with prefer(path):
        out = deform_attn(value, [(3, 4)], *places, weights).unflatten(2, (3, 5))
    assert out[0, 2, 1].isnan().all()
    assert out.isnan().sum() == 5


def test_a_number_on_a_gpu_is_told_by_the_reference_itself(monkeypatch):
    """There grid_sample reads zeros at NaN, as this stand-in does."""
    sample = torch.nn.functional.grid_sample
    monkeypatch.setattr("torch.nn.functional.grid_sample", lambda *a, **k: sample(*a, **k).nan_to_num())
    value, x, y, weights = make_inputs((3, 4))
    x[0, 0, 0, 0], y[1, 0, 0, 0] = math.nan, math.inf
    assert deform_attn_reference(value, [(3, 4)], x, y, weights)[:, 0, :5].isnan().all()


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("far", [1e30, -1e30, 3e9, -3e9, -1.5, -2.5, -7, 9.5])
def test_points_far_outside_read_nothing(path, far):
    value, x, y, weights = make_inputs((3, 4))
    x[0, 0], y[0, 1] = far, far
    with prefer(path):
        assert deform_attn(value, [(3, 4)], x, y, weights)[0, :2].eq(0).all()


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("size", [(3, 4), (1, 5)])
def test_second_derivatives_are_numeric_ones_or_refused(path, size):
    inputs = [
        t.requires_grad_()
        for t in make_inputs(size, queries=3, heads=2, dim=3, points=2, dtype=torch.float64)
    ]
    with prefer(path):
        try:
            right = gradgradcheck(lambda v, *points: deform_attn(v, [size], *points), inputs)
        except RuntimeError as error:
            if "is not implemented" not in str(error):  # grid_sample of an older torch
                raise
            right = True
    assert right


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"batch": 0, "queries": 0}])
def test_no_images_and_no_queries_give_nothing_and_gradients_of_zero(path, empty):
    inputs = make_inputs((3, 4), **empty)
    expected = (inputs[3].shape[0], inputs[3].shape[1], 15)
    with prefer(path):
        with torch.no_grad():
            assert deform_attn(inputs[0], [(3, 4)], *inputs[1:]).shape == expected
        out = deform_attn(inputs[0].requires_grad_(), [(3, 4)], *(t.requires_grad_() for t in inputs[1:]))
        assert out.shape == expected
        out.sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_both_paths_give_one_dtype_and_the_same_values(dtype):
    value, *points = make_inputs((5, 7))
    value, outs = value.to(dtype), []
    for path in ("reference", "fast"):
        with prefer(path), torch.autocast("cpu", torch.bfloat16):
            outs.append(deform_attn(value, [(5, 7)], *points))
    assert outs[0].dtype == outs[1].dtype == dtype
    torch.testing.assert_close(outs[1], outs[0])


def test_compiles_without_graph_breaks_forward_and_backward():
    inputs = [t.requires_grad_() for t in make_inputs((3, 4))]
    compiled = torch.compile(deform_attn, fullgraph=True, backend="aot_eager")
    expected = deform_attn(inputs[0], [(3, 4)], *inputs[1:])
    out = compiled(inputs[0], [(3, 4)], *inputs[1:])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_meta_tensors_pass_through(path):
    value, *points = (t.to("meta") for t in make_inputs((3, 4)))
    with prefer(path):
        assert deform_attn(value, [(3, 4)], *points).shape == (2, 11, 15)


@pytest.mark.parametrize(
    ("batch", "size", "heads", "queries", "integer"),
    [
        (2, (7, 9), 3, 5, torch.int32),
        (2, (2**14, 2**14), 4, 5, torch.int64),  # rows of the table
        (1, (3, 4), 2, 2**27, torch.int64),  # rows that are read
    ],
)
def test_rows_are_numbered_in_32_bits_as_long_as_these_reach(
    batch, size, heads, queries, integer, monkeypatch
):
    """Of tensors without numbers, since the large ones would take gigabytes."""
    numbered = []
    bag = torch.nn.functional.embedding_bag
    monkeypatch.setattr(
        "torch.nn.functional.embedding_bag",
        lambda index, *a, **k: numbered.append(index.dtype) or bag(index, *a, **k),
    )
    value = torch.empty(batch, size[0] * size[1], heads, 1, device="meta")
    points = torch.empty(3, batch, queries, heads, 2, device="meta")
    assert _read(value, [size], *points).shape == (batch, queries, heads)
    assert numbered == [integer]


def test_a_grid_that_does_not_fit_the_tokens_is_refused():
    value, *points = make_inputs((3, 4))
    with pytest.raises(ValueError, match="12 tokens, but a grid of 4x4 cells"):
        deform_attn(value, [(4, 4)], *points)
    with pytest.raises(ValueError, match="12 tokens, but grids of 3x4 and 1x1 cells"):
        deform_attn(value, [(3, 4), (1, 1)], *points)


LEVELS = [(5, 7), (1, 1), (3, 4)]


def make_levels(sizes=LEVELS, **arguments):
    """As `make_inputs`, of several levels; some points of each are outside."""
    parts = [make_inputs(size, **arguments) for size in sizes]
    value, x, y, weights = zip(*parts, strict=True)
    return torch.cat(value, 1), *(torch.cat(tensors, -1) for tensors in (x, y, weights))


@pytest.mark.parametrize("run", [deform_attn_reference, deform_attn_fast])
def test_levels_add_up_each_read_in_its_own_cells(run):
    parts = [make_inputs(size, dtype=torch.float64) for size in LEVELS]
    value, x, y, weights = zip(*parts, strict=True)
    points = [torch.cat(tensors, -1) for tensors in (x, y, weights)]
    expected = sum(by_hand(v, size, *rest) for (v, *rest), size in zip(parts, LEVELS, strict=True))
    torch.testing.assert_close(run(torch.cat(value, 1), LEVELS, *points), expected)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_gradients_of_several_levels_are_numeric_ones(path):
    inputs = make_levels(LEVELS, batch=2, queries=2, heads=2, dim=2, points=2, dtype=torch.float64)
    with prefer(path):
        assert gradcheck(
            lambda v, *points: deform_attn(v, LEVELS, *points), [t.requires_grad_() for t in inputs]
        )


def test_fast_gradients_of_several_levels_equal_reference_gradients():
    inputs = make_levels(queries=40, dtype=torch.float64)
    results = []
    for run in (deform_attn_reference, deform_attn_fast):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(leaves[0], LEVELS, *leaves[1:])
        results.append(
            (out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves))
        )
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference)


def test_second_derivatives_of_several_levels_are_the_references():
    inputs = make_levels([(2, 3), (1, 2)], queries=2, heads=1, dim=2, points=1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    seconds = []
    for run in (deform_attn_reference, deform_attn_fast):
        out = run(leaves[0], [(2, 3), (1, 2)], *leaves[1:])
        firsts = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        try:
            seconds.append(torch.autograd.grad(firsts[3].square().sum(), leaves))
        except RuntimeError as error:
            if "is not implemented" not in str(error):  # grid_sample of an older torch
                raise
            return
    torch.testing.assert_close(seconds[1], seconds[0])


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_place_that_is_no_number_on_any_level_gives_nan_and_only_there(path, level):
    value, x, y, weights = make_levels(batch=2, points=2)
    y[0, 2, 1, 2 * level + 1] = math.nan
    with prefer(path):
        out = deform_attn(value, LEVELS, x, y, weights).unflatten(2, (3, 5))
    assert out[0, 2, 1].isnan().all()
    assert out.isnan().sum() == 5


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_several_levels_in_half_precision_without_numbers_and_without_images(path):
    value, *points = make_levels()
    with prefer(path):
        out = deform_attn(value.bfloat16(), LEVELS, *points)
        assert torch.equal(out, deform_attn(value.bfloat16().float(), LEVELS, *points).bfloat16())
        meta = [t.to("meta") for t in (value, *points)]
        assert deform_attn(meta[0], LEVELS, *meta[1:]).shape == (2, 11, 15)
        assert deform_attn(value[:0], LEVELS, *(t[:0] for t in points)).shape == (0, 11, 15)


def test_many_queries_of_several_levels_are_read_in_parts_to_the_same_result():
    value, *points = make_levels(queries=MOST // 2 + 3, heads=1, dim=2, points=1)
    with torch.no_grad():
        parted = deform_attn_fast(value, LEVELS, *points)
    torch.testing.assert_close(parted, deform_attn_reference(value, LEVELS, *points))


def test_points_that_do_not_divide_among_the_levels_are_refused():
    value, *points = make_levels()
    with pytest.raises(ValueError, match="11 points of a head do not divide among 3 levels"):
        deform_attn(value, LEVELS, *(t[..., :11] for t in points))
