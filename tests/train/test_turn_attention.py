"""Attention of turns apart, held against transformers' own."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stepwell.train import turn_attention
from stepwell.train.collate import turn_mask
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task
from stepwell.train.turn_attention import TURNS_APART, attend_in_blocks, check_decoder

ROW = [0] * 37 + [1] * 9 + [2] * 14 + [3] * 5 + [-1] * 7
SHORT = [0] * 20 + [1] * 30 + [-1] * 22


class Layer(nn.Module):
    """What transformers' attention asks of a layer."""

    is_causal = True

    def __init__(self, num_key_value_groups):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(turn_attention, "_ROWS", 16)


def inputs(key_heads=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    mask = turn_mask(torch.tensor([ROW, SHORT]))
    tensors = [
        torch.randn(2, heads, len(ROW), 8, dtype=dtype, generator=generator).requires_grad_()
        for heads in (4, key_heads, key_heads)
    ]
    return Layer(4 // key_heads), tensors, mask


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_values_and_gradients_are_those_of_all_pairs(key_heads):
    layer, tensors, mask = inputs(key_heads)
    wanted, found = (
        attend(layer, *tensors, mask, scaling=0.3)[0] for attend in (sdpa_attention_forward, attend_in_blocks)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((each * weight).sum(), tensors) for each in (wanted, found)]
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.fixture
def pairs(monkeypatch):
    """(queries, keys) of every call of transformers' attention."""
    seen = []

    def attend(module, query, key, value, mask, **arguments):
        seen.append((query.shape[2], key.shape[2]))
        return sdpa_attention_forward(module, query, key, value, mask, **arguments)

    monkeypatch.setattr(turn_attention, "sdpa_attention_forward", attend)
    return seen


def test_a_block_meets_only_keys_that_one_of_its_rows_may_look_at(pairs):
    layer, tensors, mask = inputs()
    attend_in_blocks(layer, *tensors, mask)
    allowed = mask[:, 0].any(dim=0)
    wanted = [(len(rows), int(rows.any(dim=0).sum())) for rows in allowed.split(16)]
    assert pairs == wanted
    assert wanted[0] == (16, 16)
    assert sum(rows * keys for rows, keys in wanted) < 0.8 * len(ROW) ** 2


@pytest.mark.parametrize("change", ["none", "added", "heads", "bias"])
def test_other_masks_are_transformers_matter(pairs, change):
    layer, (query, key, value), mask = inputs(dtype=torch.float32)
    arguments = {}
    if change == "none":
        mask = None
    elif change == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    elif change == "heads":
        mask = mask.expand(-1, 4, -1, -1)
    else:
        arguments = {"position_bias": torch.randn(1, 4, len(ROW), len(ROW))}
    found = attend_in_blocks(layer, query, key, value, mask, **arguments)[0]
    wanted = sdpa_attention_forward(layer, query, key, value, mask, **arguments)[0]
    assert pairs == [(query.shape[2], len(ROW))]
    assert torch.equal(found, wanted)


def test_blocks_are_found_once_for_all_layers_and_forgotten_with_their_mask(monkeypatch):
    layer, tensors, mask = inputs()
    found = []
    of = turn_attention._blocks_of
    monkeypatch.setattr(turn_attention, "_blocks_of", lambda mask: found.append(mask.shape) or of(mask))
    gc.collect()
    before = len(turn_attention._blocks)
    for _ in range(3):
        attend_in_blocks(layer, *tensors, mask)
    assert len(found) == 1
    assert len(turn_attention._blocks) == before + 1
    del mask
    gc.collect()
    assert len(turn_attention._blocks) == before


@pytest.mark.parametrize(
    ("turns", "packed", "in_blocks"),
    [("apart", False, True), ("together", True, True), ("together", False, False)],
)
def test_a_stage_whose_turns_are_apart_or_samples_packed_attends_so(tmp_path, turns, packed, in_blocks):
    overrides = [f"stages.answer.turns={turns}", f"stages.answer.packed={str(packed).lower()}"]
    recipe = load_recipe("reader_smoke", [*overrides, f"output={tmp_path}"])
    task = find_task("reader")(recipe, recipe.stages[-1])
    model = task.build()
    config = model.model.language_model.config
    assert config._attn_implementation == (TURNS_APART if in_blocks else "sdpa")
    model.save_pretrained(tmp_path)
    assert TURNS_APART not in (tmp_path / "config.json").read_text()


def test_a_step_of_turns_apart_is_that_of_all_pairs(tmp_path):
    recipe = load_recipe("reader_smoke", ["stages.answer.turns=apart", f"output={tmp_path}"])
    task = find_task("reader")(recipe, recipe.stages[-1])
    model = task.build().train()
    source = task.source(recipe.stages[-1].data[0])
    batch = task.collate([task.prepare(source[i]) for i in range(2)])
    found = []
    for name in (TURNS_APART, "sdpa"):
        model.model.language_model.set_attn_implementation(name)
        model.zero_grad()
        losses = model(**batch)
        sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours["language"] > 0
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        ("llama", {}, None),
        ("gpt2", {}, None),
        ("qwen2", {}, None),
        ("mistral", {"sliding_window": 200}, None),
        ("mistral", {"sliding_window": 199}, "mistral has a window of 199 tokens; max_length is 200"),
        ("mistral", {"sliding_window": None}, None),
        ("gemma3_text", {"sliding_window": 64}, "gemma3_text has a window of 64 tokens; max_length is 200"),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": False}, None),
        ("qwen3_next", {}, "qwen3_next has layers of linear_attention"),
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
            "lfm2 has layers of conv",
        ),
        ("bloom", {}, "bloom takes no position_ids"),
    ],
)
def test_language_models_that_would_not_heed_who_may_look_where_are_refused(model_type, settings, why):
    text = AutoConfig.for_model(model_type, **settings)
    if why is None:
        check_decoder(text, 200)
    else:
        with pytest.raises(ValueError, match=f"none sees another; {why}"):
            check_decoder(text, 200)


@pytest.mark.parametrize("field", ["turns: apart", "packed: true"])
def test_a_stage_of_such_a_language_model_is_refused(field):
    sizes = "{model_type: mistral, hidden_size: 32, num_attention_heads: 2, sliding_window: 64}"
    name, value = field.split(": ")
    recipe = load_recipe("reader_smoke", [f"model.text={sizes}", "stages.answer.turns=together"])
    stage = recipe.stages[1]
    find_task("reader")(recipe, stage)
    value = True if value == "true" else value
    with pytest.raises(ValueError, match="mistral has a window of 64 tokens"):
        find_task("reader")(recipe, stage.model_copy(update={name: value}))
