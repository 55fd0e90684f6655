"""Encoder and decoder of DINO: cells of all levels read each other, then queries read cells.

DINO, arXiv 2203.03605: boxes are refined layer by layer, and a layer's prediction starts from what the one
before has made of the box ("look forward twice", section 3.5); layers of Deformable DETR, arXiv 2010.04159.
Letters: B batch, N cells of all levels, C width, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepwell.heads.dino_boxes import inverse_sigmoid
from stepwell.heads.dino_positions import Levels, box_code, cell_centres
from stepwell.layers.attention import attention
from stepwell.layers.deformable import DeformableAttention
from stepwell.layers.linear import Linear
from stepwell.layers.mlp import Mlp
from stepwell.ops.parts import in_parts
from stepwell.ops.products import linear

__all__ = [
    "Decoder",
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "LayerOutput",
    "PlacedAttention",
    "perceptron",
    "refine",
]


def perceptron(*dims: int) -> nn.Sequential:
    """Linear layers between these widths, and a ReLU between each two."""
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(dims):
        layers += [Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class EncoderLayer(nn.Module):
    """Every cell reads points of all levels around its own place; a norm follows each part."""

    def __init__(self, dim: int, *, num_heads: int, num_levels: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.attn = DeformableAttention(
            dim, dim, dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.attn_norm = nn.LayerNorm(dim)
        self.ffn = Mlp(dim, hidden_dim=ffn_dim, activation="relu")
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, cells: Tensor, code: Tensor, levels: Levels, centre: tuple[Tensor, Tensor]) -> Tensor:
        """cells and their places (B, N, C); centre: the place on every level, in its cells -> (B, N, C)."""
        values = _without_padding(self.attn.values_of(cells), levels)

        def update(cells: Tensor, code: Tensor, *centre: Tensor) -> Tensor:
            x, y = centre
            cells = self.attn_norm(cells + self.attn.read(cells + code, values, levels.sizes, (x, y)))
            out: Tensor = self.ffn_norm(cells + self.ffn(cells))
            return out

        return in_parts(update, cells, code, *centre)


class Encoder(nn.Module):
    def __init__(
        self,
        dim: int,
        *,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points, ffn_dim=ffn_dim
            )
            for _ in range(num_layers)
        )

    def forward(self, cells: Tensor, code: Tensor, levels: Levels) -> Tensor:
        """cells and the code of their places (B, N, C) -> (B, N, C)."""
        centre = _in_cells(*cell_centres(levels), levels)
        for layer in self.layers:
            cells = layer(cells, code, levels, centre)
        return cells


class PlacedAttention(nn.Module):
    """Self-attention whose queries and keys say where they are, and whose values do not.

    DETR, arXiv 2005.12872, section A.3.
    """

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _Projections(dim)
        self.proj = Linear(dim, dim)

    def reset_parameters(self) -> None:
        self.qkv.reset_parameters()
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, code: Tensor, unseen: Tensor | None) -> Tensor:
        """x and the code of its places (B, Q, C); unseen (Q, Q): True where one (row) may not see another
        -> (B, Q, C)."""
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(x + code, x))
        bias = None
        if unseen is not None:
            bias = torch.zeros_like(unseen, dtype=v.dtype).masked_fill(unseen, -math.inf)[None]
        out: Tensor = self.proj(attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return out


class _Projections(nn.Module):
    """Of queries, keys and values, in one matrix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.bias = nn.Parameter(torch.empty(3 * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, placed: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, Q, C) twice -> queries, keys and values, each (B, Q, C)."""
        of_placed = 2 * x.shape[-1]
        q, k = linear(placed, self.weight[:of_placed], self.bias[:of_placed]).chunk(2, -1)
        return q, k, linear(x, self.weight[of_placed:], self.bias[of_placed:])


class DecoderLayer(nn.Module):
    """Queries attend to each other, then read points of all levels in and around their boxes."""

    def __init__(
        self,
        dim: int,
        *,
        num_self_heads: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
    ) -> None:
        super().__init__()
        self.self_attn = PlacedAttention(dim, num_heads=num_self_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(
            dim, dim, dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = Mlp(dim, hidden_dim=ffn_dim, activation="relu")
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Tensor,
        code: Tensor,
        memory: Tensor,
        levels: Levels,
        boxes: Tensor,
        unseen: Tensor | None,
    ) -> Tensor:
        """queries and the code of their boxes (B, Q, C), memory (B, N, C), boxes (B, Q, 4) in fractions;
        unseen (Q, Q): True where a query (row) may not see another -> (B, Q, C)."""
        queries = self.self_norm(queries + self.self_attn(queries, code, unseen))

        values = _without_padding(self.cross_attn.values_of(memory), levels)
        x, y, width, height = boxes.unbind(-1)
        centre = _in_cells(x, y, levels)
        # An offset of as many as there are points, where the last of them starts, is half a box.
        halves = 2 * self.cross_attn.num_points
        unit = _in_counts(width / halves, height / halves, levels)
        read = self.cross_attn.read(queries + code, values, levels.sizes, centre, unit)
        queries = self.cross_norm(queries + read)
        out: Tensor = self.ffn_norm(queries + self.ffn(queries))
        return out


class LayerOutput(NamedTuple):
    """What a decoder layer leaves, and the boxes that its predictions start from."""

    hidden: Tensor  # (B, Q, C), from which the next layer's boxes are made
    states: Tensor  # (B, Q, C), the same behind the norm that all layers share
    references: Tensor  # (B, Q, 4) in fractions, with the gradient of the layer before


def refine(box_head: nn.Module, states: Tensor, references: Tensor) -> Tensor:
    """(B, Q, C) and boxes (B, Q, 4) in fractions -> moved boxes; the head says by how much, in logits."""
    moves: Tensor = box_head(states).to(references.dtype)
    return (moves + inverse_sigmoid(references)).sigmoid()


class Decoder(nn.Module):
    """temperature: of the code of a query's box."""

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int,
        num_self_heads: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.query_code = perceptron(2 * dim, dim, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim,
                num_self_heads=num_self_heads,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                ffn_dim=ffn_dim,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        levels: Levels,
        refiners: Sequence[Callable[[Tensor, Tensor], Tensor]],
        unseen: Tensor | None = None,
    ) -> list[LayerOutput]:
        """queries (B, Q, C), their first boxes (B, Q, 4), memory (B, N, C); refiners: of every layer, by its
        box head; unseen (Q, Q): True where a query (row) may not see another. One output a layer."""
        outputs: list[LayerOutput] = []
        boxes = references
        for layer, refiner in zip(self.layers, refiners, strict=True):
            code = self._code(boxes, levels).to(queries.dtype)
            queries = layer(queries, self.query_code(code), memory, levels, boxes, unseen)
            outputs.append(LayerOutput(queries, self.norm(queries), references))
            if len(outputs) < len(self.layers):
                references = refiner(queries, boxes)
                boxes = references.detach()
        return outputs

    def _code(self, boxes: Tensor, levels: Levels) -> Tensor:
        """(B, Q, 4) -> (B, Q, 2 C). As in the official code, the padding beside an image counts."""
        height, width = levels.sizes[0]
        shares = levels.counts[:, :1] / levels.counts.new_tensor([width, height])  # of the finest level
        boxes = boxes * torch.cat([shares, shares], -1)
        return box_code(boxes, self.dim // 2, temperature=self.temperature)


def _without_padding(values: Tensor, levels: Levels) -> Tensor:
    """(B, N, ...), nought where a cell is padding."""
    return values if levels.padding is None else values.masked_fill(levels.padding[..., None], 0)


def _in_cells(x: Tensor, y: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """(B, Q) in fractions -> columns and rows on every level, from the centre of the first cell on,
    (B, Q, 1, L, 1)."""
    columns, rows = _in_counts(x, y, levels)
    return columns - 0.5, rows - 0.5


def _in_counts(x: Tensor, y: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """(B, Q) in fractions -> in valid cells of every level, (B, Q, 1, L, 1)."""
    columns, rows = (
        (places[..., None] * levels.counts[:, None, :, axis])[:, :, None, :, None]
        for axis, places in enumerate((x, y))
    )
    return columns, rows
