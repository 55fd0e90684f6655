"""The closed-form cost of a whole pyramid: branches, interactions, and what stands behind them.

PIIP, arXiv 2501.07783, section III; branch 1 is the largest network. The cost of a tuple of sizes is a sum of
terms that depend on one size or on two neighbouring ones, each computed once: that makes planning fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from stepwell.flops.cost import (
    Convention,
    Cost,
    InteractionShape,
    Shape,
    head_cost,
    injector_cost,
    merge_cost,
)
from stepwell.structures import Size

__all__ = ["PyramidShape"]


@dataclass(frozen=True, kw_only=True)
class PyramidShape:
    """Networks, and where they meet: `meetings[j][i]` is the layer of branch j before interaction i.

    Neighbours exchange in both directions (type 4 of Table XVII). With one branch there is nothing to merge.
    """

    branches: tuple[Shape, ...]
    meetings: tuple[tuple[int, ...], ...]
    interaction: InteractionShape
    convention: Convention

    def __post_init__(self) -> None:
        if len(self.branches) != len(self.meetings) or len({len(layers) for layers in self.meetings}) != 1:
            raise ValueError(f"need one list of meetings a branch, all equally long, got {self.meetings}")

    def cost(self, sizes: Sequence[Size]) -> Cost:
        """`sizes` of the views in pixels, branch 1 first."""
        total = self.tail(sizes[-1])
        for j, size in enumerate(sizes):
            total += self.branch(j, size)
            if j:
                total += self.exchange(j, sizes[j - 1], size)
        return total

    @cache  # noqa: B019  a pyramid and its handful of sizes live as long as the planner that asks
    def branch(self, j: int, size: Size) -> Cost:
        """Branch j, and its share of the merge."""
        shape = self.branches[j]
        total = shape.cost(size, self.convention)
        if self.convention.merge == "none" or len(self.branches) == 1:
            return total
        for layer, out in self._merges(j):
            total += merge_cost(
                shape.grid(size, layer), shape.dims[layer], out, first=j == 0, merge=self.convention.merge
            )
        return total

    @cache  # noqa: B019
    def exchange(self, j: int, size: Size, next_size: Size) -> Cost:
        """All interactions between branch j-1 on a view of `size` and branch j on a view of `next_size`."""
        total = Cost()
        views = ((j - 1, size), (j, next_size))
        for i in range(len(self.meetings[j])):
            for (query, query_size), (key, key_size) in (views, views[::-1]):
                at, there = self.meetings[query][i], self.meetings[key][i]
                shape, other = self.branches[query], self.branches[key]
                charged = self.meetings[query][0] if self.convention.first_stride else at
                total += injector_cost(
                    shape.grid(query_size, at),
                    other.grid(key_size, there),
                    shape.dims[at],
                    other.dims[there],
                    self.interaction,
                    sampled=shape.grid(query_size, charged),
                )
        return total

    def tail(self, size: Size) -> Cost:
        """Final norm and classifier on the grid of the last branch, where the convention has them."""
        if self.convention.merge != "classifier":
            return Cost()
        rows, cols = self.branches[-1].grid(size)
        return head_cost(rows * cols, self.branches[0].dims[-1])

    def _merges(self, j: int) -> list[tuple[int, int]]:
        """(layer of branch j, width after merging) for each merged map."""
        if self.convention.merge == "classifier":
            return [(-1, self.branches[0].dims[-1])]
        points = (0, 1, 10, 11)  # ends of the stage-like groups of 12 interactions
        return [(self.meetings[j][i], self.branches[0].dims[self.meetings[0][i]]) for i in points]
