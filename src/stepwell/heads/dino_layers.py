"""The layers of DINO's transformer: cells read cells of all levels, queries read each other and cells.

Deformable DETR, arXiv 2010.04159, section 4; DINO, arXiv 2203.03605. Norms come behind each part.
Letters: B batch, L levels, N cells of all levels, one after the other, Nq queries, D width, M heads, P points
of a head on a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepwell.layers.linear import Linear
from stepwell.layers.mlp import Mlp
from stepwell.ops.deform_attn import deform_attn_levels
from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = ["CellLayer", "LevelAttention", "QueryLayer"]


class LevelAttention(nn.Module):
    """Every query reads `num_points` points per head and level, at offsets that it predicts."""

    def __init__(self, dim: int, *, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        points = num_heads * num_levels * num_points
        self.value = Linear(dim, dim)
        self.offsets = Linear(dim, 2 * points)
        self.weights = Linear(dim, points)
        self.out = Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head h starts out looking in direction 2 pi h / M, point k of it k + 1 cells away on each level."""
        angle = torch.arange(self.num_heads, device=self.offsets.bias.device) * (2 * math.pi / self.num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # one cell away along the longer axis
        steps = torch.arange(1, self.num_points + 1, device=ray.device)
        rays = (ray[:, None] * steps[:, None])[:, None].expand(-1, self.num_levels, -1, -1)
        for linear in (self.value, self.offsets, self.weights, self.out):
            nn.init.zeros_(linear.bias)
        self.offsets.bias.copy_(rays.flatten())
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        cells: Tensor,
        sizes: Sequence[Size],
        padding: Tensor | None = None,
    ) -> Tensor:
        """queries (B, Nq, D), cells (B, N, D), the grids of the levels -> (B, Nq, D).

        references (B, Nq, L, 2) are points (x, y) in parts of the padded maps, and offsets count cells; or
        (B, Nq, L, 4) boxes by centre and size, and an offset of P reaches an edge. padding: (B, N), True for
        cells that are read as zero.
        """
        heads = (self.num_heads, self.num_levels, self.num_points)
        exact = at_least_single(queries.dtype)  # points are lost, and softmax tails, in half
        value = self.value(cells)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        offsets = self.offsets(queries).unflatten(2, (*heads, 2)).to(exact)
        weights = self.weights(queries).unflatten(2, (heads[0], heads[1] * heads[2]))
        # The softmax is over the points; along an axis as short as theirs torch is ten times slower.
        weights = weights.transpose(2, 3).softmax(2, dtype=exact).transpose(2, 3).unflatten(3, heads[1:])
        grid = torch.tensor([[width, height] for height, width in sizes], dtype=exact, device=queries.device)
        references = references.to(exact)[:, :, None, :, None]  # (B, Nq, 1, L, 1, 2 or 4)
        steps = offsets
        if references.shape[-1] == 4:
            steps = offsets * (references[..., 2:] * grid[:, None]) / (2 * self.num_points)
        places = references[..., :2] * grid[:, None] + steps - 0.5
        value = value.unflatten(2, (self.num_heads, -1))
        answer: Tensor = self.out(deform_attn_levels(value, sizes, places[..., 0], places[..., 1], weights))
        return answer


class CellLayer(nn.Module):
    """A layer of the encoder: deformable self-attention, and a perceptron."""

    def __init__(
        self, dim: int, *, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.attention = LevelAttention(
            dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.ffn = Mlp(dim, hidden_dim=ffn_dim, activation="relu")
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=norm_eps) for _ in range(2))

    def forward(
        self, cells: Tensor, places: Tensor, references: Tensor, sizes: Sequence[Size], padding: Tensor
    ) -> Tensor:
        """cells and their places (B, N, D), references (B, N, L, 2), padding (B, N) -> (B, N, D)."""
        read = self.attention(cells + places, references, cells, sizes, padding)
        cells = self.norms[0](cells + read)
        out: Tensor = self.norms[1](cells + self.ffn(cells))
        return out


class QueryLayer(nn.Module):
    """A layer of the decoder: queries among themselves, deformable cross-attention, and a perceptron."""

    def __init__(
        self,
        dim: int,
        *,
        self_heads: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, self_heads, batch_first=True)
        self.cross_attention = LevelAttention(
            dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.ffn = Mlp(dim, hidden_dim=ffn_dim, activation="relu")
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=norm_eps) for _ in range(3))

    def forward(
        self,
        queries: Tensor,
        places: Tensor,
        references: Tensor,
        cells: Tensor,
        sizes: Sequence[Size],
        padding: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """queries and their places (B, Nq, D), references (B, Nq, L, 4), cells (B, N, D) -> (B, Nq, D).

        hidden: (Nq, Nq), True where a query, a row, may not look.
        """
        at = queries + places
        seen, _ = self.self_attention(at, at, queries, attn_mask=hidden, need_weights=False)
        queries = self.norms[0](queries + seen)
        read = self.cross_attention(queries + places, references, cells, sizes, padding)
        queries = self.norms[1](queries + read)
        out: Tensor = self.norms[2](queries + self.ffn(queries))
        return out
