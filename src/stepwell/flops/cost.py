"""What a pyramid costs, in closed form: integers in, integers out, no network built.

The official counter of PIIP (arXiv 2501.07783) hooks module classes; `Convention` says what it sees. Its unit
is the multiply-accumulate. flops/count.py counts the same on a built model, and a test holds the two together.

Letters: n tokens of a grid, D width, w side of an attention window, q and k the query's and the key's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from stepwell.structures import Size

__all__ = [
    "CONVENTIONS",
    "ConvNextShape",
    "Convention",
    "Cost",
    "InteractionShape",
    "Shape",
    "VitShape",
    "head_cost",
    "injector_cost",
    "merge_cost",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """One of the counters behind the printed figures: linear layers and convolutions always, and these."""

    name: str
    merge: Literal[
        "classifier", "detection", "none"
    ]  # the module that stands behind the branches when counting
    rms_norm: int = 0  # multiply-accumulates an element
    first_stride: bool = (
        False  # sampling is charged on the grid that a branch has after its first interaction
    )


CONVENTIONS = {
    "A": Convention(name="A", merge="classifier"),
    "D": Convention(name="D", merge="detection"),
    "L": Convention(name="L", merge="none", first_stride=True),
}
"""A: Tables I, IV, VI, VIII (with heads instead of a merge), X, XIV-XVII, README; D: II; L: XI, XIII."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates for one picture, and numbers learned."""

    macs: int = 0
    params: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.macs * times, self.params * times)


def _linear(tokens: int, dim: int, out: int, *, bias: bool = True) -> Cost:
    """The bias is not counted: the official hook forgets it."""
    return Cost(tokens * dim * out, dim * out + out * bias)


def _conv(cells: int, dim: int, out: int, kernel: int, *, groups: int = 1, bias: bool = True) -> Cost:
    """`cells` of the output. Here the hook does count the bias."""
    weight = kernel * kernel * dim // groups * out
    return Cost(cells * (weight + out * bias), weight + out * bias)


def _norm(tokens: int, dim: int, *, per_element: int = 2, bias: bool = True) -> Cost:
    return Cost(per_element * tokens * dim, dim * (1 + bias))


def _cells(grid: Size) -> int:
    return grid[0] * grid[1]


def _padded(grid: Size, window: int) -> int:
    """Cells of the grid after padding to whole windows."""
    return -(-grid[0] // window) * -(-grid[1] // window) * window * window


@dataclass(frozen=True, kw_only=True, slots=True)
class VitShape:
    """A plain ViT as the counter sees it. `windows` has one side a layer, 0 meaning global attention."""

    dim: int
    windows: tuple[int, ...]
    mlp_ratio: float = 4.0
    patch: int = 16
    class_token: bool = False
    pad_tokens: bool = False  # windows are padded before qkv, so that padding passes that layer too
    rms_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = True
    patch_bias: bool = True
    layer_scale: bool = True
    pre_norm: bool = False  # CLIP's norm before the first layer
    position_tokens: int = 0  # rows of the stored table, class slot included

    @property
    def dims(self) -> tuple[int, ...]:
        return (self.dim,) * len(self.windows)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch,) * len(self.windows)

    def grid(self, size: Size, layer: int = -1) -> Size:
        """Cells after a layer of a view of `size` pixels."""
        return size[0] // self.patch, size[1] // self.patch

    def cost(self, size: Size, convention: Convention) -> Cost:
        """Patch embedding, class token, position table and all layers for a view of `size` pixels."""
        cells = _cells(self.grid(size))
        total = _conv(cells, 3, self.dim, self.patch, bias=self.patch_bias)
        total += Cost(0, (self.position_tokens + self.class_token) * self.dim)
        if self.pre_norm:
            total += _norm(cells + self.class_token, self.dim)
        for window in set(self.windows):
            total += self._layer(size, window, convention) * self.windows.count(window)
        return total

    def _layer(self, size: Size, window: int, convention: Convention) -> Cost:
        grid, dim = self.grid(size), self.dim
        cells = _cells(grid)
        tokens = cells + self.class_token
        inside = _padded(grid, window) if self.pad_tokens and window else tokens
        hidden = int(dim * self.mlp_ratio)
        per_element = convention.rms_norm if self.rms_norm else 2
        norms = _norm(tokens, dim, per_element=per_element, bias=not self.rms_norm) * 2
        qk_norms = Cost(0, 2 * dim * self.qk_norm)
        scales = Cost(0, 2 * dim * self.layer_scale)
        linears = (
            _linear(inside, dim, 3 * dim, bias=self.qkv_bias)
            + _linear(tokens, dim, dim)
            + _linear(tokens, dim, hidden)
            + _linear(tokens, hidden, dim)
        )
        products = Cost(2 * cells * (window * window if window else cells) * dim)
        return norms + qk_norms + scales + linears + products


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNextShape:
    """A ConvNeXt as a flat list: a downsampling layer is an entry of its own. Its norms are not counted."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    final_norm: bool = False  # stored, never applied

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(width for stage, width in enumerate(self.widths) for _ in range(self._entries(stage)))

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(4 * 2**stage for stage in range(len(self.depths)) for _ in range(self._entries(stage)))

    def _entries(self, stage: int) -> int:
        return self.depths[stage] + (stage > 0)

    def grid(self, size: Size, layer: int = -1) -> Size:
        """Cells after a layer of a view of `size` pixels."""
        stride = self.strides[layer]
        return size[0] // stride, size[1] // stride

    def cost(self, size: Size, convention: Convention) -> Cost:
        """Stem and all entries for a view of `size` pixels."""
        cells = (size[0] // 4) * (size[1] // 4)
        total = _conv(cells, 3, self.widths[0], 4) + _norm(0, self.widths[0])
        for stage, (depth, dim) in enumerate(zip(self.depths, self.widths, strict=True)):
            stride = 4 * 2**stage
            cells = (size[0] // stride) * (size[1] // stride)
            if stage > 0:
                total += _norm(0, self.widths[stage - 1]) + _conv(cells, self.widths[stage - 1], dim, 2)
            block = (
                _conv(cells, dim, dim, 7, groups=dim)
                + _norm(0, dim)
                + _linear(cells, dim, 4 * dim)
                + _linear(cells, 4 * dim, dim)
                + Cost(0, dim)
            )
            total += block * depth
        return total + Cost(0, 2 * self.widths[-1] * self.final_norm)


Shape = VitShape | ConvNextShape


@dataclass(frozen=True, kw_only=True, slots=True)
class InteractionShape:
    """The interaction unit of section III-C; the defaults are those of every released configuration."""

    deformable: bool = True
    num_heads: int = 16
    num_points: int = 4
    ratio: float = 0.5
    ffn_ratio: float | None = 0.25
    project: bool = True
    norm: bool = True


@cache
def injector_cost(
    query: Size, key: Size, dim: int, other_dim: int, shape: InteractionShape, *, sampled: Size | None = None
) -> Cost:
    """One direction: cells of `query` (width `dim`) look at cells of `key` (width `other_dim`).

    The projection that brings the key's side to the query's width is included. `sampled` is the grid on which
    the sampling is charged, the query's own where it is None.
    """
    n_q, n_k = _cells(query), _cells(key)
    feature_dim = dim if shape.project else other_dim
    total = _linear(n_k, other_dim, dim) if shape.project else Cost()
    if shape.norm:
        total += _norm(n_q, dim) + _norm(n_k, feature_dim)
    if shape.deformable:
        inner, points = int(dim * shape.ratio), shape.num_heads * shape.num_points
        total += (
            _linear(n_k, feature_dim, inner)
            + _linear(n_q, dim, 2 * points)
            + _linear(n_q, dim, points)
            + _linear(n_q, inner, dim)
            + Cost(5 * _cells(sampled or query) * shape.num_points * dim)
        )
    else:
        total += (
            _linear(n_q, dim, dim, bias=False)
            + _linear(n_k, feature_dim, dim, bias=False) * 2
            + _linear(n_q, dim, dim)
            + Cost(2 * n_q * n_k * dim)
        )
    total += Cost(0, dim)
    if shape.ffn_ratio is not None:
        hidden = int(dim * shape.ffn_ratio)
        total += _linear(n_q, dim, hidden) + _linear(n_q, hidden, dim) + Cost(0, dim)
        total += _conv(n_q, hidden, hidden, 3, groups=hidden)
        total += _norm(n_q, dim) if shape.norm else Cost()
    return total


@cache
def merge_cost(grid: Size, dim: int, out: int, *, first: bool, merge: str) -> Cost:
    """What one branch pays to be merged into `out` channels on its own `grid`.

    "classifier": GroupNorm, and for all but the first branch a linear layer and another GroupNorm.
    "detection": 3x3 convolution, GroupNorm, ReLU, without the convolution for the first branch.
    """
    cells = _cells(grid)
    weight = Cost(0, 1)
    if merge == "classifier":
        if first:
            return _norm(cells, dim) + weight
        return _norm(cells, dim) + _linear(cells, dim, out) + _norm(cells, out) + weight
    relu = Cost(cells * out)
    convolution = Cost() if first else _conv(cells, dim, out, 3, bias=False)
    return convolution + _norm(cells, out) + relu + weight


def head_cost(cells: int, dim: int, num_classes: int = 1000) -> Cost:
    """Final norm over all tokens, mean, and a linear classifier."""
    return _norm(cells, dim) + _linear(1, dim, num_classes)
