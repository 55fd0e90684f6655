"""Hierarchical window attention: every query reads its own window of a view, on all levels of its pyramid.

LLaVA-UHD v2, arXiv 2412.13871, section 3.2; with one level and one set of queries it is the resampler that
the code of its first version (arXiv 2403.11703) has. Equation numbers are version 2's. Where its paper and
its released code differ, both are here, and the defaults are the code's.
Letters: B views of one shape, C width of a level, (H, W) its grid, D the language model's width, n queries of
a view, each with its window, k bins of a window on a level, K on all levels, s sets of queries, h heads.

As it is written, every cell of every level is projected, normed and pooled twice, and each set of queries
attends by itself. The fast path gives the same values with a tenth of the work: it projects no cell
(ops/pooled_norm.py), no key and no value (ops/one_query.py); and keys are values and codes that no image
changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.fuse.upsample import Correction, Level
from stepwell.fuse.window_matrices import WindowMatrices
from stepwell.layers.attention import attention
from stepwell.layers.kept import Kept, can_keep
from stepwell.layers.linear import Linear, is_plain
from stepwell.layers.position import index_position_embedding, resize_position_embedding, resize_weights
from stepwell.ops.choose import choose
from stepwell.ops.pooled_norm import Deviation, norm_of_pooled, pool_for_norm
from stepwell.ops.precision import at_least_single, product_dtype, without_autocast
from stepwell.ops.products import linear
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
    channels, or the next smaller number that divides the width.
    """

    grid: Size = (12, 12)
    query_sets: Annotated[int, Field(ge=1)] = 4
    bins: Literal["code", "paper"] | Size = "code"
    pyramid: bool = False
    level_code: Literal["before", "behind", "none"] = "before"
    window_code: bool = False
    bias: bool = True
    num_heads: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        for name, sides in (("grid", self.grid), ("bins", self.bins)):
            if not isinstance(sides, str) and min(sides) < 1:
                raise ValueError(f"{name} has a row and a column at least, got {list(sides)}")


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
        self.config, self.dims, self.levels = config, tuple(dims), tuple(levels)
        if out_dim % 4:  # rows and columns of a position, sines and cosines of each
            raise ValueError(f"the windows' width is the language model's, a multiple of 4, got {out_dim}")
        most = max(1, out_dim // 128)
        self.num_heads = config.num_heads or next(n for n in range(most, 0, -1) if out_dim % n == 0)
        if out_dim % self.num_heads:
            raise ValueError(
                f"the language model's width {out_dim} is not a multiple of {self.num_heads} heads; "
                "change windows.num_heads"
            )
        num_queries = config.grid[0] * config.grid[1]
        self.projections = nn.ModuleList(
            Linear(dim, out_dim, bias=config.bias) if dim != out_dim or config.bias else nn.Identity()
            for dim in dims
        )
        has_codes = config.level_code != "none"
        self.level_codes = nn.Parameter(torch.zeros(len(dims), out_dim)) if has_codes else None
        self.position = nn.Parameter(torch.empty(num_queries, out_dim))
        self.queries = nn.Parameter(torch.empty(config.query_sets, num_queries, out_dim))
        self.query_norm = nn.LayerNorm(out_dim, eps=EPS)
        self.norm = nn.LayerNorm(out_dim, eps=EPS)
        self.qkv = Linear(out_dim, 3 * out_dim)
        self.mix = Linear(out_dim, out_dim)
        joined = config.query_sets > 1
        self.set_norm = nn.LayerNorm(out_dim, eps=EPS) if joined else nn.Identity()
        self.join = Linear(config.query_sets * out_dim, out_dim) if joined else nn.Identity()
        self.out_norm = nn.LayerNorm(out_dim, eps=EPS)
        self.out = Linear(out_dim, out_dim, bias=False)
        self._kept: Kept[WindowMatrices] = Kept()
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
        nn.init.trunc_normal_(self.queries, std=0.02)
        if self.level_codes is not None:
            nn.init.zeros_(self.level_codes)
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
        """views: of some views of one shape after the other, the maps (B, C, H, W) of all levels of one
        pyramid, the finest last -> (views, n, D), the queries row by row.
        """
        norms = (self.query_norm, self.norm)
        fast_ok = is_plain(self.qkv, Linear) and all(is_plain(norm, nn.LayerNorm) for norm in norms)
        fast_ok = fast_ok and all(is_plain(layer, Linear, nn.Identity) for layer in self.projections)
        if choose(fast_ok=fast_ok, why_not="a layer is adapted, heard, quantised or elsewhere: call it"):
            return self._finish(self._fast(views))
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
            if self.level_codes is not None and self.config.level_code == "before":
                coded = coded + self.level_codes[i]
            key, value = (
                window_pool(x.movedim(-1, 1), self.config.grid, bins) for x in (coded, cells)
            )  # (B, n, k, D)
            if self.level_codes is not None and self.config.level_code == "behind":
                key = key + self.level_codes[i]
            if self.config.window_code:
                key = key + index_position_embedding(key.shape[-1], bins, device=key.device).to(key.dtype)
            keys.append(key)
            values.append(value)
        k, v = self.qkv(torch.cat(keys, 2)).chunk(3, -1)[1], self.qkv(torch.cat(values, 2)).chunk(3, -1)[2]
        sets = []
        for q in self.qkv(self.query_norm(self.queries) + self.position).chunk(3, -1)[0]:
            q = q[None, :, None].expand(len(k), -1, -1, -1)
            q, keys_, values_ = (
                x.flatten(0, 1).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)
            )
            read = attention(q, keys_, values_)  # (B*n, h, 1, D / h)
            sets.append(read.flatten(1).unflatten(0, (len(k), -1)))
        return torch.stack(sets)

    # ---- pooled before it is projected ----------------------------------------------------------------

    def _fast(self, views: Iterable[Sequence[Level]]) -> Tensor:
        """-> (s, B, n, D)."""
        pooled: list[list[Tensor]] = []
        for levels in views:
            if not pooled:
                sizes, matrices = self._sizes(levels), self._matrices(levels)
            pooled.append(self._pool(levels, matrices))
            del levels  # before the next are made
        with without_autocast(self.position.device):
            cells = [torch.cat(level) for level in zip(*pooled, strict=True)]
            del pooled
            heads = matrices.read(cells, self._codes(sizes, matrices))
        return heads.movedim(2, 0).flatten(3)

    def _pool(self, levels: Sequence[Level], matrices: WindowMatrices) -> list[Tensor]:
        """Of every level, pooled cells (B, n, k, C + 2)."""
        bins = [bins for _, bins in self._sizes(levels)]
        with without_autocast(self.position.device):
            return [
                pool_for_norm(level.map, deviation, self.config.grid, of_level, edges=self.position.dtype)
                for level, deviation, of_level in zip(levels, matrices.deviations, bins, strict=True)
            ]

    def _matrices(self, levels: Sequence[Level]) -> WindowMatrices:
        """Folded and kept where no gradient is recorded."""
        corrections = [level.correction for level in levels]
        layers = [self.projections, self.query_norm, self.norm, self.qkv]
        layers += [correction for correction in corrections if correction is not None]
        made_of = [parameter for layer in layers for parameter in layer.parameters()]
        tables = (self.position, self.queries, self.level_codes)
        made_of += [table for table in tables if table is not None]
        dtype = product_dtype(self.position.dtype, self.position.device)
        with without_autocast(self.position.device):
            if not can_keep(made_of):
                self._kept.forget()
                return self._new_matrices(corrections, dtype)
            of = dtype, self.query_norm.eps, self.norm.eps, *(each is None for each in corrections)
            return self._kept(lambda: self._new_matrices(corrections, dtype, fold=True), made_of, of=of)

    def _new_matrices(
        self, corrections: Sequence[Correction | None], dtype: torch.dtype, *, fold: bool = False
    ) -> WindowMatrices:
        """dtype: of products. What is made of several matrices is made in fp32 at least, and then rounded."""
        of_query, of_key, of_value = self.qkv.weight.chunk(3)
        bias_of_query, _, bias_of_value = self.qkv.bias.chunk(3)  # that of keys is the same for all of them
        queries = self.query_norm(self.queries).transpose(0, 1) + self.position[:, None]
        queries = self._heads(linear(queries, of_query, bias_of_query))
        queries = queries * queries.shape[-1] ** -0.5
        codes = self.position if self.level_codes is None else torch.cat([self.position, self.level_codes])
        codes = self._keys(codes, of_key)
        key, value = of_key.unflatten(0, (self.num_heads, -1)), of_value.unflatten(0, (self.num_heads, -1))
        matrices = WindowMatrices(
            deviations=[],
            projections=[],
            queries=queries.to(dtype),
            codes=torch.einsum("nshd,zhd->nshz", queries.to(codes.dtype), codes),
            keys=[key],
            value=value.transpose(1, 2),
            bias=self._heads(bias_of_value).to(dtype),
        )
        levels = (self._norm_of_pooled(*level) for level in zip(self.projections, corrections, strict=True))
        return matrices.folded(levels, self.dims) if fold else matrices.projected(levels)

    def _norm_of_pooled(
        self, projection: nn.Module, correction: Correction | None
    ) -> tuple[Deviation, Tensor]:
        """A level's projection, with the correction of its map in it, and the norm behind it."""
        gain, shift = (x.to(at_least_single(x.dtype)) for x in (self.norm.weight, self.norm.bias))
        if isinstance(projection, nn.Linear):
            weight = projection.weight.to(gain.dtype)
            bias = torch.zeros_like(gain) if projection.bias is None else projection.bias.to(gain.dtype)
        else:
            weight, bias = torch.eye(len(gain), dtype=gain.dtype, device=gain.device), torch.zeros_like(gain)
        if correction is not None:
            matrix, offset = correction.affine()
            weight, bias = weight @ matrix, bias + weight @ offset
        return norm_of_pooled(weight, bias, gain, shift, eps=self.norm.eps)

    def _heads(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., h, d)."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads

    def _keys(self, codes: Tensor, of_key: Tensor) -> Tensor:
        """Codes (z, D), times the matrix of keys -> (z, h, d) in fp32 at least."""
        keys = self._heads(linear(codes, of_key))
        return keys.to(at_least_single(keys.dtype))

    def _codes(self, sizes: Sequence[tuple[Size, Size]], matrices: WindowMatrices) -> Tensor:
        """What a key has beside its value, times the queries: (n, s, h, K)."""
        shares = []  # of every code in every bin
        for i, (size, bins) in enumerate(sizes):
            pools = [
                pooling_matrix(*axis, self.position.dtype, device=self.position.device)
                for axis in zip(size, self.config.grid, bins, strict=True)
            ]
            of_map = self._in_windows(*(pool.sum(1, keepdim=True) for pool in pools))  # less than 1 beyond it
            if self.config.level_code == "behind":
                of_map = torch.ones_like(of_map)
            tables = (
                resize_weights(*sides).to(pool.dtype).to(pool.device)
                for sides, pool in zip(zip(self.config.grid, size, strict=True), pools, strict=True)
            )
            of_place = self._in_windows(*(pool @ table for pool, table in zip(pools, tables, strict=True)))
            num_codes = 0 if self.level_codes is None else len(self.level_codes)
            of_levels = [of_map * (i == j) for j in range(num_codes)]
            shares.append(torch.cat([of_place, *of_levels], 2))
        codes = torch.einsum("nshz,nkz->nshk", matrices.codes, torch.cat(shares, 1))
        if self.config.window_code:
            places = [
                index_position_embedding(self.position.shape[1], bins, device=self.position.device)
                for _, bins in sizes
            ]
            keys = self._keys(torch.cat(places).to(self.position.dtype), self.qkv.weight.chunk(3)[1])
            codes = codes + torch.einsum("nshd,khd->nshk", matrices.queries.to(keys.dtype), keys)
        return codes

    def _in_windows(self, rows: Tensor, cols: Tensor) -> Tensor:
        """(grid rows * r, a) and (grid cols * c, b) -> (n, k, a * b)."""
        rows, cols = (
            axis.unflatten(0, (n, -1)) for axis, n in zip((rows, cols), self.config.grid, strict=True)
        )
        return torch.einsum("ira,jcb->ijrcab", rows, cols).flatten(4).flatten(2, 3).flatten(0, 1)
