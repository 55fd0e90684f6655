"""Our decoder against transformers' Llama: logits, greedy answers token by token, the settings it takes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepwell.language.decoder import LlamaDecoder, decode_greedily, plain_llama

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    "eos_token_id": 3,
    "pad_token_id": 0,
}
PADDED = torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 8, [1] * 9])


def pair(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **changes}, initializer_range=0.3)
    theirs = LlamaForCausalLM(config).eval().to(dtype)
    settings = plain_llama(config.to_dict())
    assert settings is not None
    ours = LlamaDecoder(settings).eval().to(dtype)
    ours.load_state_dict(theirs.model.state_dict())
    return ours, theirs


def prompts(model):
    ids = torch.randint(4, 100, PADDED.shape)
    return ids, model.get_input_embeddings()(ids)


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4, "head_dim": 8}, {"num_key_value_heads": 1}]
)
@torch.no_grad()
def test_logits_of_padded_prompts_are_those_of_transformers(changes):
    ours, theirs = pair(**changes)
    _, embeddings = prompts(theirs)
    expected = theirs(inputs_embeds=embeddings, attention_mask=PADDED).logits
    positions = (PADDED.cumsum(1) - 1).clamp(min=0)
    hidden = ours(embeddings, positions, PADDED.bool(), ours.new_cache(embeddings, PADDED.shape[1]))
    is_text = PADDED.bool()
    torch.testing.assert_close(theirs.lm_head(hidden)[is_text], expected[is_text], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_is_theirs_but_for_rounding():
    exact, _ = pair()
    ours, theirs = pair(torch.bfloat16)
    _, embeddings = prompts(theirs)
    positions, is_text = (PADDED.cumsum(1) - 1).clamp(min=0), PADDED.bool()
    expected = theirs.model(inputs_embeds=embeddings, attention_mask=PADDED).last_hidden_state
    hidden, reference = (
        model(x, positions, is_text, model.new_cache(x, PADDED.shape[1]))
        for model, x in ((ours, embeddings), (exact, embeddings.float()))
    )
    assert hidden.dtype == torch.bfloat16
    error, theirs_error = (
        (states.float() - reference)[is_text].square().mean().sqrt() for states in (hidden, expected)
    )
    assert error < 1.2 * theirs_error


@torch.no_grad()
def test_answers_are_those_of_generate_token_by_token():
    ours, theirs = pair()
    ids, embeddings = prompts(theirs)
    options = {"max_new_tokens": 24, "do_sample": False}
    free = theirs.generate(ids, attention_mask=PADDED, **options)[:, ids.shape[1] :]
    never, end = [int(free[0, 1])], [3, int(free[1, 4])]  # so that both rules have something to do
    expected = theirs.generate(
        ids, attention_mask=PADDED, suppress_tokens=never, eos_token_id=end, pad_token_id=0, **options
    )[:, ids.shape[1] :]
    columns = []
    answers = decode_greedily(
        ours,
        theirs.lm_head,
        embeddings,
        PADDED.bool(),
        max_new_tokens=24,
        end=end,
        never=never,
        each=columns.append,
    )
    assert answers.tolist() == expected.tolist()
    assert torch.stack(columns, 1).tolist() == answers.tolist()
    assert answers.tolist() != free.tolist()


def test_decoding_stops_when_every_answer_has_ended():
    ours, theirs = pair()
    with torch.no_grad():
        _, embeddings = prompts(theirs)
        end = list(range(101))
        answers = decode_greedily(ours, theirs.lm_head, embeddings, PADDED.bool(), max_new_tokens=9, end=end)
    assert answers.shape == (3, 1)


def test_the_plain_network_is_taken_with_all_its_sizes():
    settings = plain_llama(LlamaConfig(**SIZES).to_dict())
    assert settings is not None
    assert settings.rope_theta == 300.0
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert getattr(settings, name) == SIZES[name]


OTHER = {
    "model_type": "mistral",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 64,
    "is_encoder_decoder": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "quantization_config": {"quant_method": "bitsandbytes"},
    "sliding_window": 64,
    "rope_scaling": None,
    "a_field_of_next_year": 0,
}


@pytest.mark.parametrize("field", OTHER)
def test_any_other_field_goes_the_way_of_transformers(field):
    fields = LlamaConfig(**SIZES).to_dict()
    assert fields.get(field, ...) != OTHER[field]
    assert plain_llama({**fields, field: OTHER[field]}) is None


@pytest.mark.parametrize("field", sorted(LlamaConfig(**SIZES).to_dict()))
def test_a_field_that_is_not_there_is_either_told_or_of_no_matter(field):
    """An absent field is transformers' default, which we do not repeat."""
    fields = LlamaConfig(**SIZES).to_dict()
    del fields[field]
    assert plain_llama(fields) in (None, plain_llama(LlamaConfig(**SIZES).to_dict()))


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {},
        {"rope_type": "default"},
        {"rope_type": "dynamic", "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ],
)
def test_rotary_embeddings_of_another_kind_are_not_taken(rope):
    assert plain_llama({**LlamaConfig(**SIZES).to_dict(), "rope_parameters": rope}) is None
