"""Starting values that let a small decoder look where a question points.

Not a paper's part. Left to chance, a decoder takes very long to find out that "[0.037, 0.376, 0.223, 0.405]"
names cells of a picture. Here coordinates and cells begin with one code (layers/position.py), and one
attention head with queries and keys that compare it. Everything is trained afterwards.
Letters: D the language model's width, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepwell.encoders.vit import PositionTable
from stepwell.layers.position import fraction_code
from stepwell.train.tokenizer import coordinate_tokens

__all__ = ["start_coordinates", "start_looking", "start_position_tables", "start_query_and_key"]

_COORDINATE, _TABLE, _COMPARISON = 0.3, 0.3, 1.5  # weights of the codes and of their comparison


def start_looking(model: Any, tokenizer: Any, *, layers: tuple[int, ...] = (1, 2), head: int = 0) -> None:
    """All of them, in a model of ours with a Llama-like language model."""
    start_coordinates(model.get_input_embeddings().weight, tokenizer)
    for module in model.modules():
        if isinstance(module, PositionTable):
            start_position_tables(module)
    for layer in layers:
        start_query_and_key(model.model.language_model.layers[layer].self_attn, head)


@torch.no_grad()
def start_coordinates(embedding: Tensor, tokenizer: Any) -> None:
    """Rows of `embedding` (vocabulary, D): a left edge takes the code of a column, a bottom edge that of a
    row, as cells have them; the other two edges take both.
    """
    code = _COORDINATE * fraction_code(torch.arange(1001) / 1000, embedding.shape[1] // 2)
    nothing = torch.zeros_like(code)
    halves = {"left": (code, nothing), "bottom": (nothing, code), "plain": (code, code)}
    for form, tokens in coordinate_tokens().items():
        rows = tokenizer.convert_tokens_to_ids(tokens)
        embedding[rows] = torch.cat(halves[form], dim=1).to(embedding.dtype)


@torch.no_grad()
def start_position_tables(position: PositionTable) -> None:
    """Cells of an encoder's table begin as codes of their column and row, as fine as the table can hold."""
    height, width = position.grid
    dim = position.table.shape[1] // 2
    down, across = (
        fraction_code((torch.arange(n) + 0.5) / n, dim, shortest=2.2 / n) for n in (height, width)
    )
    cells = torch.cat([across.expand(height, -1, -1), down[:, None].expand(-1, width, -1)], dim=2)
    position.table[int(position.class_slot) :] = _TABLE * cells.flatten(0, 1)


@torch.no_grad()
def start_query_and_key(attention: Any, head: int) -> None:
    """Queries and keys of one head read the same d / 2 channels of the place code, half of them for columns.

    They go to the channels that rotary position turns least, so that the comparison works at any distance.
    What was in the weights stays, this is added.
    """
    dim, width = attention.head_dim, attention.q_proj.weight.shape[1]
    quarter = width // 4  # columns' sines, columns' cosines, rows' sines, rows' cosines
    picks = torch.linspace(0, quarter - 1, dim // 8).round().long()
    channels = torch.cat([picks + quarter * part for part in range(4)])
    slow = torch.cat([torch.arange(dim // 4, dim // 2), torch.arange(3 * dim // 4, dim)])
    kv_head = head // attention.num_key_value_groups
    attention.q_proj.weight[head * dim + slow, channels] += _COMPARISON
    attention.k_proj.weight[kv_head * dim + slow, channels] += _COMPARISON
