"""Starting values that let a small decoder look where a question points.

Not a paper's part. Left to chance, a decoder takes very long to find out that "[0.037, 0.376, 0.223, 0.405]"
names cells of an image. Here coordinates and cells begin with one code (layers/position.py); a head of the
first layer begins by carrying the code of a box to the token before the answer; and heads of later layers
begin by comparing it with the cells', and by handing on what they find there. Everything is trained
afterwards.
Letters: D the language model's width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.encoders.vit import PositionEmbedding
from stepwell.layers.position import SHORTEST, fraction_embedding
from stepwell.reader.tokenizer import coordinate_tokens

__all__ = [
    "start_carrying",
    "start_coordinates",
    "start_copying",
    "start_looking",
    "start_position_tables",
    "start_query_and_key",
]

_COORDINATE, _TABLE, _COMPARISON = 0.3, 0.3, 1.5  # weights of the codes and of their comparison
_SEARCH, _CARRY = 0.7, 3.0  # weights of the search for a box and of what is brought from there


def start_looking(model: Any, tokenizer: Any, *, layers: Sequence[int], head: int) -> None:
    """All of them, in a model of ours whose language model is one of pointer.py's DECODERS."""
    embedding = model.get_input_embeddings()
    projector = getattr(model.config.vision, "projector", None)
    shortest = getattr(projector, "place_shortest", SHORTEST)
    start_coordinates(embedding.weight, tokenizer, shortest=shortest)
    for module in model.modules():
        if isinstance(module, PositionEmbedding):
            start_position_tables(module)
    decoder = model.model.language_model.layers
    before_answer = tokenizer.convert_tokens_to_ids("\n")  # ends the assistant's header in the templates
    start_carrying(decoder[0].self_attn, embedding.weight, before_answer, head)
    for layer in layers:
        start_query_and_key(decoder[layer].self_attn, head)
        if decoder[layer] is not decoder[0]:  # where the head has a box to carry
            start_copying(decoder[layer].self_attn, head)


@torch.no_grad()
def start_coordinates(embedding: Tensor, tokenizer: Any, *, shortest: float = SHORTEST) -> None:
    """Rows of `embedding` (vocabulary, D): a left edge takes the code of a column, a bottom edge that of a
    row, as cells have them, down to their wavelength `shortest`; the other two edges take both. Left and
    bottom share a mark of equal length.
    """
    places = torch.arange(1001) / 1000
    code = _COORDINATE * fraction_embedding(places, embedding.shape[1] // 2, shortest=shortest)
    nothing = torch.zeros_like(code)
    mark = _mark(embedding.shape[1]) * code[0].norm()
    halves = {"left": (code, nothing), "bottom": (nothing, code), "plain": (code, code)}
    for form, tokens in coordinate_tokens().items():
        rows = tokenizer.convert_tokens_to_ids(tokens)
        embedding[rows] = torch.cat(halves[form], dim=1) + (0.0 if form == "plain" else mark)


@torch.no_grad()
def start_position_tables(position: PositionEmbedding) -> None:
    """Cells of an encoder's table begin as codes of their column and row, as fine as the table can hold."""
    height, width = position.grid
    dim = position.table.shape[1] // 2
    down, across = (
        fraction_embedding((torch.arange(n) + 0.5) / n, dim, shortest=2.2 / n) for n in (height, width)
    )
    cells = torch.cat([across.expand(height, -1, -1), down[:, None].expand(-1, width, -1)], dim=2)
    position.table[int(position.class_slot) :] = _TABLE * cells.flatten(0, 1)


@torch.no_grad()
def start_query_and_key(attention: Any, head: int) -> None:
    """Queries and keys of one head read the same d / 2 channels of the place code, half of them for columns.

    They go to the channels that rotary position turns least, so that the comparison works at any distance.
    What was in the weights stays, this is added.
    """
    dim, channels, slow = _wiring(attention)
    kv_head = head // attention.num_key_value_groups
    attention.q_proj.weight[head * dim + slow, channels] += _COMPARISON
    attention.k_proj.weight[kv_head * dim + slow, channels] += _COMPARISON


@torch.no_grad()
def start_copying(attention: Any, head: int) -> None:
    """One head hands on what it looks at: d directions of it, drawn by chance and orthonormal, as they are.

    It replaces what was in the head's values and its part of the output. From random ones almost nothing of
    what is seen would arrive, and no gradient would go back.
    """
    dim, width = attention.head_dim, attention.q_proj.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(width, dim, generator=generator)).Q
    kv_head = head // attention.num_key_value_groups
    attention.v_proj.weight[kv_head * dim : (kv_head + 1) * dim] = directions.T
    attention.o_proj.weight[:, head * dim : (head + 1) * dim] = directions


@torch.no_grad()
def start_carrying(attention: Any, embedding: Tensor, token: int, head: int) -> None:
    """One head of the first layer takes the code of a box's left and bottom edge to `token`.

    It replaces what was in the head: `token` alone searches, for the mark of those edges, at any distance.
    """
    dim, channels, slow = _wiring(attention)
    kv_head = head // attention.num_key_value_groups
    rows = slice(head * dim, (head + 1) * dim)
    kv_rows = slice(kv_head * dim, (kv_head + 1) * dim)
    for weight, part in ((attention.q_proj.weight, rows), (attention.k_proj.weight, kv_rows)):
        weight[part] = 0
    attention.v_proj.weight[kv_rows] = 0
    attention.o_proj.weight[:, rows] = 0
    still = int(slow[dim // 4 - 1])  # the channel that rotary position turns least
    attention.q_proj.weight[head * dim + still] = _SEARCH * embedding[token] / embedding[token].norm()
    attention.k_proj.weight[kv_head * dim + still] = _SEARCH * _mark(embedding.shape[1])
    carried = torch.arange(len(channels))
    attention.v_proj.weight[kv_head * dim + carried, channels] = 1.0
    attention.o_proj.weight[channels, head * dim + carried] = _CARRY


def _wiring(attention: Any) -> tuple[int, Tensor, Tensor]:
    """-> d; the d / 2 channels of a place code that are compared; those d / 2 of a head that turn least."""
    dim, width = attention.head_dim, attention.q_proj.weight.shape[1]
    quarter = width // 4  # columns' sines, columns' cosines, rows' sines, rows' cosines
    picks = torch.linspace(0, quarter - 1, dim // 8).round().long()
    channels = torch.cat([picks + quarter * part for part in range(4)])
    return dim, channels, torch.cat([torch.arange(dim // 4, dim // 2), torch.arange(3 * dim // 4, dim)])


def _mark(dim: int) -> Tensor:
    """A fixed direction of length 1 that no code is near to."""
    return F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(0)), dim=0)
