"""What layers cost, in closed form: integers in, integers out, no network built.

The official counter of PIIP (arXiv 2501.07783) hooks module classes; `Convention` says what it sees. Its unit
is the multiply-accumulate. flops/count.py counts the same on a built model, and a test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from stepwell.models.settings import InteractionConfig
from stepwell.structures import Size

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Cost",
    "area",
    "conv_cost",
    "head_cost",
    "injector_cost",
    "linear_cost",
    "merge_cost",
    "norm_cost",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """One of the counters behind the printed figures.

    All of them count linear layers without and convolutions with their bias, torch's LayerNorm and GroupNorm
    at 2 an element, ReLU modules at 1, attention products at 2 n m D (in windows n w^2 D, the padding left
    out), deformable sampling at 5 n P D; nothing else. They count no norm of ConvNeXt.
    """

    name: str
    linear_merge: bool = False  # merging and heads are replaced by a classifier's
    first_stride: bool = False  # sampling is charged on the grid a branch has at its first interaction
    rms_norm: int = 0  # an element


CONVENTIONS = {
    "A": Convention(name="A", linear_merge=True),
    "D": Convention(name="D"),
    "L": Convention(name="L", first_stride=True),
}
"""A: Tables I, IV, VI, VIII, X, XIV-XVII, README; D, the model as it is: Table II; L: XI, XIII."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates for one picture, and numbers learned."""

    macs: int = 0
    params: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.macs * times, self.params * times)


def area(grid: Size) -> int:
    return grid[0] * grid[1]


def linear_cost(tokens: int, dim: int, out: int, *, bias: bool = True) -> Cost:
    return Cost(tokens * dim * out, dim * out + out * bias)


def conv_cost(cells: int, dim: int, out: int, kernel: int, *, groups: int = 1, bias: bool = True) -> Cost:
    """`cells` are those of the output."""
    weights = kernel * kernel * dim // groups * out + out * bias
    return Cost(cells * weights, weights)


def norm_cost(tokens: int, dim: int, *, per_element: int = 2, bias: bool = True) -> Cost:
    return Cost(per_element * tokens * dim, dim * (1 + bias))


@cache
def injector_cost(
    query: Size,
    key: Size,
    dim: int,
    other_dim: int,
    interaction: InteractionConfig,
    *,
    sampled: Size | None = None,
) -> Cost:
    """One message: cells of `query` (width `dim`) read cells of `key` (width `other_dim`).

    The projection of the read cells to the reader's width is included. `sampled` is the grid on which the
    sampling is charged, the query's own where it is None.
    """
    n, m = area(query), area(key)
    width = dim if interaction.project else other_dim
    total = linear_cost(m, other_dim, dim) if interaction.project else Cost()
    if interaction.norm:
        total += norm_cost(n, dim) + norm_cost(m, width)
    if interaction.attention == "deformable":
        inner, points = int(dim * interaction.ratio), interaction.num_heads * interaction.num_points
        total += (
            linear_cost(m, width, inner)
            + linear_cost(n, dim, 2 * points)
            + linear_cost(n, dim, points)
            + linear_cost(n, inner, dim)
            + Cost(5 * area(sampled or query) * interaction.num_points * dim)
        )
    else:
        total += (
            linear_cost(n, dim, dim, bias=False)
            + linear_cost(m, width, dim, bias=False) * 2
            + linear_cost(n, dim, dim)
            + Cost(2 * n * m * dim)
        )
    total += Cost(0, dim)
    if interaction.ffn_ratio is not None:
        hidden = int(dim * interaction.ffn_ratio)
        total += linear_cost(n, dim, hidden) + linear_cost(n, hidden, dim) + Cost(0, dim)
        total += conv_cost(n, hidden, hidden, 3, groups=hidden)
        total += norm_cost(n, dim) if interaction.norm else Cost()
    return total


@cache
def merge_cost(
    kind: Literal["linear", "dense", "stages"], grid: Size, dim: int, out: int, *, first: bool
) -> Cost:
    """What one branch pays to be merged into `out` channels: its stack of fuse/merge.py on its own `grid`."""
    cells, weight = area(grid), Cost(0, 1)
    if kind == "linear":
        total = weight + norm_cost(cells, dim)
        return total if first else total + linear_cost(cells, dim, out) + norm_cost(cells, out)
    norm_and_relu = norm_cost(cells, out) + Cost(cells * out)
    if kind == "stages":
        total = weight + norm_and_relu
        return total if first else total + conv_cost(cells, dim, out, 3, bias=False)
    convs = conv_cost(cells, dim, out, 3, bias=False) + conv_cost(cells, out, out, 3, bias=False)
    return weight + convs + norm_and_relu * 2


def head_cost(tokens: int, dim: int, num_classes: int) -> Cost:
    """Final norm over all tokens, and a linear classifier of one."""
    return norm_cost(tokens, dim) + linear_cost(1, dim, num_classes)
