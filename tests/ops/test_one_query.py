"""Windows with few queries: the fast twin equals its definition, and that plain attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepwell.ops.one_query import one_query_fast, one_query_reference

VIEWS, WINDOWS, SETS, HEADS, DIM = 2, 5, 3, 2, 4


def make_inputs(levels, dtype=torch.float64):
    """levels: (bins, width) of each."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    queries = draw(WINDOWS, SETS, HEADS, DIM)
    codes = draw(WINDOWS, SETS, HEADS, sum(bins for bins, _ in levels))
    cells = [draw(VIEWS, WINDOWS, bins, width) for bins, width in levels]
    keys = [draw(HEADS, DIM, width) for _, width in levels]
    value = draw(HEADS, sum(width for _, width in levels), DIM)
    return queries, codes, cells, keys, value, draw(HEADS, DIM)


@pytest.mark.parametrize("levels", [[(6, 5)], [(6, 5), (1, 7), (9, 3)]])
def test_fast_and_reference_are_equal_and_so_are_their_gradients(levels):
    inputs = make_inputs(levels)
    leaves = [*inputs[:2], *inputs[2], *inputs[3], *inputs[4:]]
    got, wanted = one_query_fast(*inputs), one_query_reference(*inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    grad = torch.randn_like(wanted)
    pairs = zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("run", [one_query_fast, one_query_reference])
def test_a_window_is_what_torch_attends_to(run):
    queries, codes, (cells,), (key,), value, bias = make_inputs([(6, 5)])
    got = run(queries, codes, [cells], [key], value, bias)
    for window in range(WINDOWS):
        k = cells[1, window] @ key.transpose(1, 2)  # (heads, k, d)
        v = cells[1, window] @ value + bias[:, None]
        q, mask = queries[window].transpose(0, 1), codes[window].transpose(0, 1)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        torch.testing.assert_close(got[1, window], wanted.transpose(0, 1), rtol=0, atol=1e-11)


def test_gradients():
    queries, codes, cells, keys, value, bias = make_inputs([(2, 3), (1, 2)])
    inputs = (queries[:2, :1], codes[:2, :1], *(level[:1, :2] for level in cells), *keys, value, bias)
    inputs = tuple(x.detach().requires_grad_() for x in inputs)

    def run(queries, codes, a, b, key_a, key_b, value, bias):
        return one_query_fast(queries, codes, [a, b], [key_a, key_b], value, bias)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("run", [one_query_fast, one_query_reference])
def test_scores_are_not_rounded_to_half_precision(run):
    """Two cells of values 0 and 1 whose scores half precision could not tell apart."""
    zero, one = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    cells = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(1, 1, 2, 1)
    codes = torch.tensor([100.0, 100.2]).view(1, 1, 1, 2)
    got = run(zero[None], codes, [cells], [one], one, zero[0])
    assert abs(float(got) - float(torch.tensor(0.2).sigmoid())) < 0.004
