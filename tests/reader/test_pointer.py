"""The pointer reads a language model's own attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel

from stepwell.reader.pointer import DECODERS, Pointers, tap_attention

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}


def pointers_of(positions, cells, visual, row=0):
    return Pointers(row=row, positions=positions, cells=cells, visual=visual)


POINTED = pointers_of(torch.tensor([9, 11]), torch.tensor([2, 0]), torch.arange(2, 8))


@pytest.fixture
def model() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_is_that_of_the_models_attention_weights(decoder, head):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(decoder, **SIZES)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # begins as 0
            torch.nn.init.normal_(parameter)
    ids = torch.arange(24).unflatten(0, (2, 12))
    with tap_attention([model.layers[1], model.layers[2]]) as tap:
        attentions = model(ids, output_attentions=True).attentions
    expected = []
    for layer in (1, 2):
        for row in range(2):
            seen = attentions[layer][row, head][POINTED["positions"]][:, POINTED["visual"]]
            chosen = (seen / seen.sum(1, keepdim=True))[torch.arange(2), POINTED["cells"]]
            expected.append(-chosen.log().mean())
    both = [POINTED, Pointers(**{**POINTED, "row": 1})]
    torch.testing.assert_close(tap.loss(both, head=head), torch.stack(expected).mean())


def test_gradients_reach_queries_and_keys_of_that_head_alone(model):
    with tap_attention([model.layers[1]]) as tap:
        model(torch.arange(12)[None])
    tap.loss([POINTED], head=1).backward()
    attention = model.layers[1].self_attn
    touched = attention.q_proj.weight.grad.unflatten(0, (4, 8)).abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, False, False]
    assert attention.v_proj.weight.grad is None
    assert model.layers[2].self_attn.q_proj.weight.grad is None


def test_a_sample_with_more_positions_weighs_more_where_that_is_wanted(model):
    more = pointers_of(torch.arange(8, 12), torch.tensor([1, 3, 0, 5]), torch.arange(2, 8))
    with tap_attention(list(model.layers[:2])) as tap:
        model(torch.arange(12)[None])
    one, other, both = (tap.loss(pointers) for pointers in ([more], [POINTED], [more, POINTED]))
    torch.testing.assert_close(both, (one + other) / 2)
    weighed = tap.loss([more, POINTED], power=0.5)
    torch.testing.assert_close(weighed, (2 * one + 2**0.5 * other) / (2 + 2**0.5))


def test_rows_without_pointers_have_no_loss(model):
    nothing = pointers_of(torch.tensor([]).long(), torch.tensor([]).long(), torch.arange(2, 8))
    with tap_attention([model.layers[0]]) as tap:
        model(torch.arange(12)[None])
    assert tap.loss([nothing]) is None


def test_the_tap_is_closed_behind_the_block(model):
    with tap_attention([model.layers[0]]) as tap:
        pass
    model(torch.arange(12)[None])
    assert not tap.seen
