"""Starting values: coordinates, cells and one attention head share a code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from stepwell.encoders.vit import PositionEmbedding
from stepwell.layers.position import fraction_embedding, fraction_position_embedding
from stepwell.reader.pointer import Pointers, tap_attention
from stepwell.reader.start import (
    start_carrying,
    start_coordinates,
    start_copying,
    start_position_tables,
    start_query_and_key,
)
from stepwell.reader.task import ReaderTask
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.recipe import load_recipe


@pytest.mark.parametrize("at", [0.2, 0.61])
def test_the_code_of_a_fraction_is_most_like_itself(at):
    places = torch.arange(0, 1, 0.01)
    likeness = fraction_embedding(places, 128) @ fraction_embedding(torch.tensor([at]), 128)[0]
    assert places[likeness.argmax()] == pytest.approx(at, abs=1e-5)


@pytest.mark.parametrize("shortest", [0.07, 0.01])
def test_left_and_bottom_edges_begin_as_the_code_of_their_cells_column_and_row(shortest):
    tokenizer = build_reader_tokenizer()
    embedding = nn.Embedding(len(tokenizer), 32)
    start_coordinates(embedding.weight, tokenizer, shortest=shortest)

    def step(first, second):
        """What moving an edge changes; the mark that edges share falls out."""
        ids = tokenizer.convert_tokens_to_ids([first, second])
        return embedding.weight[ids[1]] - embedding.weight[ids[0]]

    cells = fraction_position_embedding(32, (10, 10), shortest=shortest)  # centres at 0.05, 0.15 ...
    cells = cells.unflatten(0, (10, 10))
    ratio = step("[0.150", "[0.750").norm() / (cells[0, 7] - cells[0, 1]).norm()
    torch.testing.assert_close(step("[0.150", "[0.750"), ratio * (cells[0, 7] - cells[0, 1]))
    torch.testing.assert_close(step("0.250]", "0.950]"), ratio * (cells[9, 4] - cells[2, 4]))


def test_tables_keep_the_class_tokens_row():
    position = PositionEmbedding(16, (4, 6), class_slot=True)
    start_position_tables(position)
    assert not position.table[0].any()
    rows = position.table[1:].unflatten(0, (4, 6))
    torch.testing.assert_close(rows[0, 3, :8], rows[2, 3, :8])
    torch.testing.assert_close(rows[2, 0, 8:], rows[2, 5, 8:])
    assert not torch.allclose(rows[0, 3, 8:], rows[2, 3, 8:])


def test_the_started_head_looks_at_the_cell_whose_code_it_is_given():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    rope = {"rope_type": "default", "rope_theta": 1.0e7}
    model = LlamaModel(LlamaConfig(vocab_size=8, rope_parameters=rope, **sizes))
    start_query_and_key(model.layers[0].self_attn, head=1)
    cells = fraction_position_embedding(128, (8, 8))
    targets = torch.tensor([3, 30, 60])
    pointers = Pointers(row=0, positions=torch.arange(64, 67), cells=targets, visual=torch.arange(64))
    with tap_attention([model.layers[0]]) as tap, torch.no_grad():
        model(inputs_embeds=torch.cat([cells, cells[targets]])[None])
    assert tap.loss([pointers], head=1) < 0.6 * tap.loss([pointers], head=0)


def test_the_token_before_the_answer_is_brought_the_code_of_the_box():
    torch.manual_seed(0)
    tokenizer = build_reader_tokenizer()
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    rope = {"rope_type": "default", "rope_theta": 1.0e7}
    model = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), rope_parameters=rope, **sizes))
    embedding = model.embed_tokens.weight
    start_coordinates(embedding, tokenizer)
    attention = model.layers[0].self_attn
    with torch.no_grad():  # the other head is silent
        attention.o_proj.weight.zero_()
    start_carrying(attention, embedding, tokenizer.convert_tokens_to_ids("\n"), head=0)
    brought = []
    attention.register_forward_hook(lambda module, args, output: brought.append(output[0]))
    question = "Read [0.650, 0.200, 0.900, 0.350] and 0.100<|im_end|><|im_start|>assistant\n"
    model(torch.tensor([tokenizer(question, add_special_tokens=False).input_ids]))
    cells = fraction_position_embedding(128, (10, 10))
    (tokens,) = brought[0]
    assert int((cells @ tokens[-1]).argmax()) == 3 * 10 + 6


@pytest.mark.parametrize(("head", "kv_head"), [(0, 0), (3, 1)])
def test_the_started_head_hands_on_what_it_looks_at(head, kv_head):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=1, intermediate_size=8, **sizes))
    attention = model.layers[0].self_attn
    other = attention.v_proj.weight.clone()
    start_copying(attention, head)
    values = attention.v_proj.weight.unflatten(0, (2, 16))
    handed = (attention.o_proj.weight.unflatten(1, (4, 16))[:, head] @ values[kv_head]).detach()
    torch.testing.assert_close(handed, handed.T)  # onto 16 directions, as they are
    torch.testing.assert_close(handed @ handed, handed)
    assert handed.trace() == pytest.approx(16, abs=1e-4)
    torch.testing.assert_close(values[1 - kv_head], other.unflatten(0, (2, 16))[1 - kv_head])


def test_a_head_of_the_first_layer_goes_on_carrying_where_it_looks_too():
    recipe = load_recipe("reader_smoke", ["stages.answer.pointer_layers=[0, 1]"])
    torch.manual_seed(0)
    first, second, _ = ReaderTask(recipe, recipe.stages[1]).build().model.language_model.layers
    dim = first.self_attn.head_dim

    def handed(layer):
        attention = layer.self_attn
        return (attention.o_proj.weight[:, :dim] @ attention.v_proj.weight[:dim]).detach()

    torch.testing.assert_close(handed(second), handed(second) @ handed(second))
    assert not torch.allclose(handed(first), handed(first) @ handed(first), atol=0.1)
