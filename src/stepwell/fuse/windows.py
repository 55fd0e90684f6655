"""Hierarchical window attention: every query reads its own window of a view, on all levels of its pyramid.

LLaVA-UHD v2, arXiv 2412.13871, section 3.2; with one level and one set of queries it is the resampler that
the code of its first version (arXiv 2403.11703) has. Equation numbers are version 2's. Where its paper and
its released code differ, both are here, and the defaults are the code's.
Letters: B views of one shape, C width of a level, (H, W) its grid, D the language model's width, n queries of
a view, each with its window, k bins of a window on a level, K on all levels, s sets of queries, h heads.

As it is written, every cell of every level is projected, normed and pooled twice, and each set of queries
attends by itself. The fast path gives the same values without that. Pooling is linear, so it can come before
the projection, once the deviation is known that the norm divides by (`_deviation`). Keys are values and a
code that no image changes. And where a window has one query, that is multiplied by the key's projection in
place of the keys, as the value's projection is taken of what the attention gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.fuse.upsample import Level
from stepwell.layers.attention import attention
from stepwell.layers.linear import Linear
from stepwell.layers.position import index_position_embedding, resize_position_embedding
from stepwell.ops.choose import choose
from stepwell.ops.window_pool import pooling_matrix, window_pool
from stepwell.structures import Size

__all__ = ["BINS", "PAPER_BINS", "WindowAttention", "WindowConfig", "nearest_bins"]

BINS: tuple[Size, ...] = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
"""(rows, columns) that a window may be pooled to, those of the released code in its order."""
PAPER_BINS: tuple[Size, ...] = ((2, 4), (2, 3), (3, 3), (4, 2), (3, 2))
"""Those of equation 5."""
EPS = 1e-6


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WindowConfig:
    """grid: of the queries. query_sets: sets of queries, which are joined behind the attention. bins: (rows,
    columns) that a window is pooled to; of the "code" or the "paper", those whose aspect is nearest to the
    view's. pyramid: twice as many each way on every further level. level_code: what tells levels apart is
    added to keys before they are pooled, or behind that, or not at all. window_code: a code of the place in
    the window is added, as the paper says. bias: of the levels' projections. num_heads: None is one for 128
    channels.
    """

    grid: Size = (12, 12)
    query_sets: Annotated[int, Field(ge=1)] = 4
    bins: Literal["code", "paper"] | Size = "code"
    pyramid: bool = False
    level_code: Literal["before", "behind", "none"] = "before"
    window_code: bool = False
    bias: bool = True
    num_heads: Annotated[int, Field(ge=1)] | None = None


def nearest_bins(size: Size, candidates: Sequence[Size] = BINS) -> Size:
    """Of the candidates, the first whose aspect is nearest to that of a map of `size`: equation 5."""
    aspect = math.log(size[1] / size[0])
    return min(candidates, key=lambda bins: abs(aspect - math.log(bins[1] / bins[0])))


class WindowAttention(nn.Module):
    """dims: width of every level that is read; levels: 0 for the ViT's own map, 1 for twice its size."""

    def __init__(
        self, dims: Sequence[int], out_dim: int, config: WindowConfig, *, levels: Sequence[int]
    ) -> None:
        super().__init__()
        self.config, self.levels = config, tuple(levels)
        self.num_heads = config.num_heads or max(1, out_dim // 128)
        if out_dim % self.num_heads:
            raise ValueError(f"width {out_dim} is not a multiple of {self.num_heads} heads")
        num_queries = config.grid[0] * config.grid[1]
        self.projections = nn.ModuleList(
            Linear(dim, out_dim, bias=config.bias) if dim != out_dim or config.bias else nn.Identity()
            for dim in dims
        )
        has_codes = config.level_code != "none"
        self.level_codes = nn.ParameterList(torch.zeros(out_dim) for _ in dims if has_codes)
        self.position = nn.Parameter(torch.empty(num_queries, out_dim))
        self.queries = nn.ParameterList(torch.empty(num_queries, out_dim) for _ in range(config.query_sets))
        self.query_norm = nn.LayerNorm(out_dim, eps=EPS)
        self.norm = nn.LayerNorm(out_dim, eps=EPS)
        self.qkv = Linear(out_dim, 3 * out_dim)
        self.mix = Linear(out_dim, out_dim)
        joined = config.query_sets > 1
        self.set_norm = nn.LayerNorm(out_dim, eps=EPS) if joined else nn.Identity()
        self.join = Linear(config.query_sets * out_dim, out_dim) if joined else nn.Identity()
        self.out_norm = nn.LayerNorm(out_dim, eps=EPS)
        self.out = Linear(out_dim, out_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries and linear weights truncated normal of std 0.02, biases and codes of levels 0; the last
        matrix normal of std D^-0.5, positions sines and cosines.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.out.weight, std=len(self.out.weight) ** -0.5)
        for query in self.queries:
            nn.init.trunc_normal_(query, std=0.02)
        for code in self.level_codes:
            nn.init.zeros_(code)
        with torch.no_grad():
            self.position.copy_(index_position_embedding(self.position.shape[1], self.config.grid))

    def bins(self, size: Size, level: int) -> Size:
        """(rows, columns) of a window on a level, for a view whose ViT gives a map of `size`."""
        chosen = self.config.bins
        if isinstance(chosen, str):
            chosen = nearest_bins(size, BINS if chosen == "code" else PAPER_BINS)
        factor = 2**level if self.config.pyramid else 1
        return chosen[0] * factor, chosen[1] * factor

    def forward(self, views: Iterable[Sequence[Level]]) -> Tensor:
        """views: of some views of one shape after the other, the maps (B, C, H, W) of all levels, the finest
        last -> (views, n, D), the queries row by row.
        """
        if choose():
            pooled = [self._pool(levels) for levels in views]
            return self._finish(self._attend([_Pooled.join(level) for level in zip(*pooled, strict=True)]))
        return self._finish(torch.cat([self._reference(levels) for levels in views], dim=1))

    def _finish(self, heads: Tensor) -> Tensor:
        """What the heads of each set have read, (s, B, n, D) -> (B, n, D)."""
        sets = self.set_norm(self.mix(heads))
        out: Tensor = self.out(self.out_norm(self.join(sets.movedim(0, 2).flatten(2))))
        return out

    def _sizes(self, levels: Sequence[Level]) -> list[tuple[Size, Size]]:
        """Grid and bins of every level."""
        maps = [(level.map.shape[-2], level.map.shape[-1]) for level in levels]
        coarsest = (maps[0][0] >> self.levels[0], maps[0][1] >> self.levels[0])
        return [(size, self.bins(coarsest, level)) for size, level in zip(maps, self.levels, strict=True)]

    # ---- as it is written -----------------------------------------------------------------------------

    def _reference(self, levels: Sequence[Level]) -> Tensor:
        """Levels of B views -> (s, B, n, D): equations 6 and 7."""
        keys, values = [], []
        for i, (level, (size, bins)) in enumerate(zip(levels, self._sizes(levels), strict=True)):
            cells = self.norm(self.projections[i](level.corrected().movedim(1, -1)))  # (B, H, W, D)
            place = resize_position_embedding(self.position, self.config.grid, size).unflatten(0, size)
            coded = cells + place
            if self.config.level_code == "before":
                coded = coded + self.level_codes[i]
            key, value = (
                window_pool(x.movedim(-1, 1), self.config.grid, bins) for x in (coded, cells)
            )  # (B, n, k, D)
            if self.config.level_code == "behind":
                key = key + self.level_codes[i]
            if self.config.window_code:
                key = key + index_position_embedding(key.shape[-1], bins, device=key.device).to(key.dtype)
            keys.append(key)
            values.append(value)
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        k = F.linear(torch.cat(keys, 2), weights[1], biases[1])
        v = F.linear(torch.cat(values, 2), weights[2], biases[2])
        sets = []
        for query in self.queries:
            q = F.linear(self.query_norm(query) + self.position, weights[0], biases[0])
            q = q[None, :, None].expand(len(k), -1, -1, -1)
            q, keys_, values_ = (
                x.flatten(0, 1).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)
            )
            read = attention(q, keys_, values_)  # (B*n, h, 1, D / h)
            sets.append(read.flatten(1).unflatten(0, (len(k), -1)))
        return torch.stack(sets)

    # ---- pooled before it is projected ----------------------------------------------------------------

    def _folded(self, i: int, level: Level) -> tuple[Tensor, Tensor]:
        """Level i's projection, less the mean that the norm subtracts, and with the correction of the map in
        it: weight (D, C), bias (D,).
        """
        projection = self.projections[i]
        if isinstance(projection, nn.Linear):
            matrix, shift = projection.weight, projection.bias
        else:
            matrix, shift = torch.eye(len(self.norm.weight)).to(self.norm.weight), None
        weight = matrix - matrix.mean(0)
        bias = weight.new_zeros(len(weight)) if shift is None else shift - shift.mean()
        if level.correction is not None:
            correction, offset = level.correction.affine()
            weight, bias = weight @ correction, bias + weight @ offset
        return weight, bias

    def _pool(self, levels: Sequence[Level]) -> list[_Pooled]:
        pooled = []
        for i, (level, (size, bins)) in enumerate(zip(levels, self._sizes(levels), strict=True)):
            weight, bias = self._folded(i, level)
            cells = level.map.movedim(1, -1)  # (B, H, W, C)
            scale = _deviation(cells, weight, bias).reciprocal()  # (B, H, W)
            scaled = torch.cat([cells * scale[..., None], scale[..., None]], -1)
            windows = window_pool(scaled.movedim(-1, 1), self.config.grid, bins)
            pooled.append(_Pooled(windows, weight, bias, size, bins))
        return pooled

    def _codes(self, level: _Pooled, i: int) -> tuple[Tensor, Tensor]:
        """What a key has beside its value: (n, k, D); and (n, k, 1), how much of a window lies on the map."""
        grid = self.config.grid
        table = self.position.t().unflatten(1, grid)[None].float()
        place = F.interpolate(table, level.size, mode="bicubic", align_corners=False)
        code = window_pool(place, grid, level.bins)[0].to(self.position.dtype)
        rows, cols = (pooling_matrix(*axis).sum(1) for axis in zip(level.size, grid, level.bins, strict=True))
        share = (rows.unflatten(0, (grid[0], 1, -1, 1)) * cols.unflatten(0, (1, grid[1], 1, -1))).flatten(2)
        share = share.flatten(0, 1)[..., None].to(code)
        if self.config.level_code != "none":
            of_level = self.level_codes[i]
            code = code + (of_level * share if self.config.level_code == "before" else of_level)
        if self.config.window_code:
            code = code + index_position_embedding(code.shape[-1], level.bins, device=code.device).to(code)
        return code, share

    def _attend(self, levels: Sequence[_Pooled]) -> Tensor:
        """-> (s, B, n, D)."""
        of_query, of_key, of_value = (w.unflatten(0, (self.num_heads, -1)) for w in self.qkv.weight.chunk(3))
        bias_of_query, _, bias_of_value = self.qkv.bias.chunk(3)
        queries = torch.stack(list(self.queries))
        q = F.linear(self.query_norm(queries) + self.position, of_query.flatten(0, 1), bias_of_query)
        q = q.unflatten(2, (self.num_heads, -1)) * of_key.shape[1] ** -0.5  # (s, n, h, d)
        asked = torch.einsum("snhd,hde->nshe", q, of_key)  # each head's query in the width of a key
        values, codes = [], []
        for i, level in enumerate(levels):
            code, share = self._codes(level, i)
            cells, scale = level.windows[..., :-1], level.windows[..., -1:]
            value = F.linear(cells, level.weight) + scale * level.bias
            values.append(value * self.norm.weight + share * self.norm.bias)
            codes.append(code)
        value, code = torch.cat(values, 2), torch.cat(codes, 1)  # (B, n, K, D), (n, K, D)
        asked = asked.flatten(1, 2)
        scores = torch.einsum("nqe,bnke->bnqk", asked, value) + torch.einsum("nqe,nke->nqk", asked, code)
        read = (scores.softmax(-1) @ value).unflatten(2, (len(queries), -1))  # (B, n, s, h, D)
        out = torch.einsum("bnshe,hde->sbnhd", read, of_value).flatten(3)
        return out + bias_of_value


class _Pooled(NamedTuple):
    """Windows of one level of B views, before its projection."""

    windows: Tensor  # (B, n, k, C + 1): cells over their deviation, and 1 over it
    weight: Tensor
    bias: Tensor
    size: Size
    bins: Size

    @staticmethod
    def join(parts: Sequence[_Pooled]) -> _Pooled:
        return parts[0]._replace(windows=torch.cat([part.windows for part in parts]))


def _deviation(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cells (..., C) -> (...): the root of the mean square of weight @ cell + bias, without projecting it."""
    products = weight.t() @ weight / len(weight)
    cross, constant = 2 * (bias @ weight) / len(weight), bias.square().mean() + EPS
    square = (cells @ products * cells).sum(-1) + cells @ cross
    return (square + constant).clamp(min=EPS).sqrt()
