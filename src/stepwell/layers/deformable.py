"""What deformable attention learns: where every query looks, how much of each place it takes, and of what.

Deformable DETR, arXiv 2010.04159, equation 3. Whoever uses it says where a query's offsets start.
Letters: B batch, d width of the query, d_f width of what it reads, N queries, S cells of all levels, M heads,
L levels, P points of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepwell.layers.linear import Linear
from stepwell.ops.deform_attn import deform_attn
from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = ["DeformableAttention"]


class DeformableAttention(nn.Module):
    """Every query reads `num_points` points per head and level, at offsets that it predicts.

    inner: the width of all heads together, a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        inner: int,
        *,
        num_heads: int,
        num_points: int = 4,
        num_levels: int = 1,
    ) -> None:
        super().__init__()
        if inner < 1 or inner % num_heads:
            raise ValueError(f"{inner} channels do not divide into {num_heads} heads of deformable attention")
        self.num_heads = num_heads
        self.num_points = num_points
        self.num_levels = num_levels
        self.value = Linear(feature_dim, inner)
        self.offsets = Linear(dim, num_heads * num_levels * num_points * 2)
        self.weights = Linear(dim, num_heads * num_levels * num_points)
        self.out = Linear(inner, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head h starts out looking in direction 2 pi h / num_heads, its k-th point k + 1 cells away."""
        angle = torch.arange(self.num_heads, device=self.offsets.bias.device) * (2 * math.pi / self.num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # one cell away along the longer axis
        steps = torch.arange(1, self.num_points + 1, device=ray.device)
        points = (ray[:, None] * steps[:, None])[:, None].expand(-1, self.num_levels, -1, -1)
        for linear in (self.value, self.offsets, self.weights, self.out):
            nn.init.zeros_(linear.bias)
        self.offsets.bias.copy_(points.flatten())
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def values_of(self, features: Tensor) -> Tensor:
        """features (B, S, d_f) -> what is read at the points, (B, S, inner)."""
        values: Tensor = self.value(features)
        return values

    def read(
        self,
        query: Tensor,
        values: Tensor,
        sizes: Sequence[Size],
        centre: tuple[Tensor, Tensor],
        unit: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """query (B, N, d), values of the cells of grids `sizes` -> (B, N, d). centre, unit: of `points`."""
        x, y, weights = self.points(query, centre, unit)
        value = values.unflatten(2, (self.num_heads, -1))
        answer: Tensor = self.out(deform_attn(value, sizes, x, y, weights))
        return answer

    def points(
        self, query: Tensor, centre: tuple[Tensor, Tensor], unit: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, N, d) -> columns and rows of the points that are read, in cells of their level from the
        centre of the first, and how much of each; (B, N, M, L*P), in fp32 at least.

        centre: columns and rows where offsets start, in cells of every level; unit: columns and rows of an
        offset of one, without it one cell. They broadcast to (B, N, M, L, P).
        """
        exact = at_least_single(query.dtype)  # points are lost, and softmax tails, in half
        heads = (self.num_heads, self.num_levels * self.num_points)
        offsets = self.offsets(query).unflatten(2, (self.num_heads, self.num_levels, self.num_points, 2))
        steps = offsets.to(exact).unbind(-1)
        if unit is not None:
            steps = tuple(step * size for step, size in zip(steps, unit, strict=True))
        x, y = ((start + step).flatten(3) for start, step in zip(centre, steps, strict=True))
        # The softmax is over the points; along an axis as short as theirs torch is ten times slower.
        weights = self.weights(query).unflatten(2, heads).transpose(2, 3).softmax(2, dtype=exact)
        return x, y, weights.transpose(2, 3)
