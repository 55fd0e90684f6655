"""What is live at once in a training step, on the meta device, against what a few lines hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from stepwell.flops.memory import peak_bytes

SIDE = 256
ONE = SIDE * SIDE * 4  # bytes of a matrix


def matrix(*, learns=False):
    return torch.empty(SIDE, SIDE, device="meta", requires_grad=learns)


def test_what_a_layer_keeps_and_what_a_gradient_needs():
    weight, x = matrix(learns=True), matrix()
    # x and the weight are there before; a sum keeps nothing of the product, so that one is live at a time.
    assert peak_bytes(lambda: (x @ weight).sum()) == pytest.approx(ONE, rel=0.01)


@pytest.mark.parametrize("layers", [2, 6])
def test_a_chain_keeps_what_every_layer_has_made(layers):
    weights = [matrix(learns=True) for _ in range(layers)]

    def run():
        x = matrix()
        for weight in weights:
            x = torch.sin(x @ weight)
        return x.sum()

    # The input, the sine's input of every layer, the last sine; then gradients come while those go.
    assert (2 * layers + 1) * ONE <= peak_bytes(run) <= (2 * layers + 4) * ONE


def test_what_is_let_go_is_counted_no_more():
    weight = matrix(learns=True)

    def run():
        for _ in range(10):
            matrix().mul(2)
        return (matrix() @ weight).sum()

    assert peak_bytes(run) <= 4 * ONE


def test_views_and_changes_in_place_take_no_memory():
    weight = matrix(learns=True)

    def run():
        x = matrix()
        for _ in range(10):
            x = x.t().reshape(SIDE, SIDE).add_(1)[:]
        return (x @ weight).sum()

    assert peak_bytes(run) <= 4 * ONE


def test_attention_holds_no_weight_for_every_pair():
    query, key, value = (torch.empty(1, 2, 4096, 32, device="meta", requires_grad=True) for _ in range(3))
    one = query.numel() * 4
    needed = peak_bytes(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True).sum())
    assert needed <= 5.2 * one < 4096 * 4096
    kept = F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert F.scaled_dot_product_attention is kept


def test_layers_that_run_again_keep_their_inputs_alone():
    weights = [matrix(learns=True) for _ in range(8)]

    def layer(x, weight):
        return torch.sin(torch.sin(torch.sin(x @ weight)))

    def run(again):
        x = matrix().requires_grad_()
        for weight in weights:
            x = checkpoint(layer, x, weight, use_reentrant=False) if again else layer(x, weight)
        return x.sum()

    assert peak_bytes(lambda: run(True)) < 0.7 * peak_bytes(lambda: run(False))
