"""The closed-form cost of a whole pyramid: branches, interactions, merging, classifier.

PIIP, arXiv 2501.07783, section III; branch 1 is the largest network. The cost of a tuple of sizes is a sum of
terms that depend on one size or on two, each computed once: that makes planning fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

from stepwell.encoders.catalogue import ENCODERS
from stepwell.flops.cost import Convention, Cost, area, head_cost, injector_cost, merge_cost
from stepwell.flops.shapes import VitShape, shape_of
from stepwell.fuse.interaction import DIRECTIONS, Direction
from stepwell.models.settings import BranchConfig, InteractionConfig
from stepwell.structures import Size

__all__ = ["Merge", "PyramidCost", "as_counted"]

Merge = Literal["linear", "dense", "stages", "none"]
"""The stacks of fuse/merge.py. "none": a norm and a head a branch, where there are classes."""

PADS_TOKENS = ("augreg", "mae", "dinov2", "internvit")
"""Families whose windows the counter of Table I pads before qkv."""


class PyramidCost:
    """Costs of a pyramid at any sizes; the sizes in `branches` are not looked at.

    merge_after: interactions after which all branches are merged, beside the last. num_classes: a norm over
    the merged map and a classifier follow.
    """

    def __init__(
        self,
        branches: Sequence[BranchConfig],
        interaction: InteractionConfig,
        convention: Convention,
        *,
        merge: Merge = "none",
        merge_after: Sequence[int] = (),
        num_classes: int | None = None,
    ) -> None:
        self.shapes = [shape_of(branch.encoder, branch.arguments) for branch in branches]
        self.interaction = interaction
        self.convention = convention
        self.merge = merge
        self.num_classes = num_classes
        ends = [[last for _, last in branch.interactions] for branch in branches]
        self.layers = list(zip(*ends, strict=True))  # of all branches, before each interaction
        final = tuple(len(shape.dims) - 1 for shape in self.shapes)
        self.merge_layers = [*(self.layers[i] for i in merge_after), final]
        self.links: dict[Direction, list[int]] = {}  # interactions in which a direction takes part
        for i in range(len(self.layers)):
            for unit in DIRECTIONS[interaction.directions](len(branches), i):
                for direction in unit:
                    self.links.setdefault(direction, []).append(i)
        self._branch = cache(self._branch_cost)
        self._link = cache(self._link_cost)
        self._stacks = cache(self._stacks_cost)

    def cost(self, sizes: Sequence[Size]) -> Cost:
        """`sizes` of the views in pixels, branch 1 first."""
        return sum(self.parts(sizes).values(), Cost())

    def parts(self, sizes: Sequence[Size]) -> dict[str, Cost]:
        """The same, part by part."""
        parts = {f"branches.{j}": self._branch(j, size) for j, size in enumerate(sizes)}
        links = (self._link(a, b, sizes[a], sizes[b]) for a, b in self.links)
        parts["interactions"] = sum(links, Cost())
        if self.merge != "none":
            parts["merges"] = sum((self._stacks(j, size) for j, size in enumerate(sizes)), Cost())
        if self.num_classes is not None:
            parts["head"] = self._heads(sizes, self.num_classes)
        return parts

    def _branch_cost(self, j: int, size: Size) -> Cost:
        return self.shapes[j].cost(size, self.convention)

    def _link_cost(self, source: int, target: int, source_size: Size, target_size: Size) -> Cost:
        """All messages from one branch to another."""
        total = Cost()
        for i in self.links[source, target]:
            read, reader = self.layers[i][source], self.layers[i][target]
            charged = self.layers[0][target] if self.convention.first_stride else reader
            total += injector_cost(
                self._grid(target, target_size, reader),
                self._grid(source, source_size, read),
                self.shapes[target].dims[reader],
                self.shapes[source].dims[read],
                self.interaction,
                sampled=self._grid(target, target_size, charged),
            )
        return total

    def _stacks_cost(self, j: int, size: Size) -> Cost:
        """Branch j's share of all merges."""
        assert self.merge != "none"
        total = Cost()
        for layers in self.merge_layers:
            grid, out = self._grid(j, size, layers[j]), self.shapes[0].dims[layers[0]]
            total += merge_cost(self.merge, grid, self.shapes[j].dims[layers[j]], out, first=j == 0)
        return total

    def _heads(self, sizes: Sequence[Size], num_classes: int) -> Cost:
        if self.merge != "none":
            grid = self._grid(-1, sizes[-1], -1)
            return head_cost(area(grid), self.shapes[0].dims[-1], num_classes)
        return sum((head_cost(1, shape.dims[-1], num_classes) for shape in self.shapes), Cost())

    def _grid(self, j: int, size: Size, layer: int) -> Size:
        stride = self.shapes[j].strides[layer]
        return size[0] // stride, size[1] // stride


def as_counted(branch: BranchConfig, convention: str) -> BranchConfig:
    """The branch as the counter of Table I had it: DeiT's windows padded after qkv."""
    entry = ENCODERS[branch.encoder]
    if convention != "A" or entry.family in PADS_TOKENS or not isinstance(shape_of(branch.encoder), VitShape):
        return branch
    return replace(branch, arguments={**branch.arguments, "window_padding": "qkv"})
