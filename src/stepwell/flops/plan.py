"""The best pyramids under a budget: which image size to give to each of several networks.

PIIP (arXiv 2501.07783, section V) chooses its sizes by hand. Here every tuple is priced (flops/prices.py). A
larger pyramid always costs more, so within a budget size decides: a tuple is beaten by one that is at least
as large in every branch. Sizes are strictly ordered and parameter-inverted: branch 1 is the largest network
and sees the smallest image.

What is priced is the vision system that is printed (models/piip.py), on an image of the aspect that was asked
for: its own geometry tells the views, and its branches and interactions are charged as `stepwell flops`
charges them, by convention L of flops/count.py. PIIP's tables charge more for such branches: a classifier
(A) or the merging of a detector (D) behind them.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, takewhile

import yaml

from stepwell.encoders.catalogue import ENCODERS
from stepwell.flops.branches import parse_branches, unsized_branches
from stepwell.flops.count import PADS_TOKENS, Convention
from stepwell.flops.prices import branch_macs, branch_prices
from stepwell.flops.text import aligned
from stepwell.models.piip import PiipConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.structures import Size
from stepwell.views.pyramid import Framing, pyramid_sizes

__all__ = ["Plan", "plan", "plans_as_json", "plans_as_table", "plans_as_yaml"]

MOST_CANDIDATES = 300_000
"""Looks at what a branch costs at a size."""
MOST_BENT = 0.05
"""How far the views' aspect may be from the one asked for: 1120/896/448 at 4:3 is 4.8 % off."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A vision system whose sizes fit the budget; what begins with branch 1 does so everywhere.

    views: what its branches see of an image of the aspect that was asked for, (height, width). gflops: what
    its branches and interactions cost on that image, in 1e9 multiply-accumulates. printed_gflops: what PIIP's
    tables print for such branches at such sizes. tokens: visual tokens of the image.
    """

    vision: PiipConfig
    views: tuple[Size, ...]
    gflops: float
    printed_gflops: float
    tokens: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Long sides."""
        return tuple(branch.size for branch in self.vision.branches)

    @property
    def windows(self) -> tuple[int, ...]:
        """Sides of the attention windows in cells, 0 where attention is global."""
        return tuple(branch.spec.window for branch in self.vision.branches)

    @property
    def resolution(self) -> str:
        """As the papers print it, the largest image first."""
        return _joined(self.sizes)


def plan(
    branches: str | Sequence[str],
    budget_gflops: float,
    *,
    step: int | None = None,
    aspect: str = "1:1",
    slack: float = 0.01,
    smallest: int | None = None,
    interactions: int = 12,
    windows: int | None = None,
) -> list[Plan]:
    """Every tuple of sizes within the budget that no other beats, largest image first.

    branches: as `parse_branches` takes them, or encoders of the catalogue, largest network first.
    budget_gflops: of `Plan.gflops`; tuples up to `slack` above it are kept, because budgets are
    rounded. step: sizes are its multiples, each rounded to the stride of its own branch; by default 112, or
    the next multiple of the smallest stride. aspect: width:height of the images, whose long side is the size;
    tuples whose views would be off by more than 5 % are left out, and those with a view that has fewer cells
    across than the windows. smallest: least size of branch 1. windows: side of the attention windows, 0 for
    none; by default as published.
    Raises ValueError for settings that make no sense, and where nothing fits the budget.
    """
    names = parse_branches(branches) if isinstance(branches, str) else list(branches)
    unsized = unsized_branches(names, windows=windows, interactions=interactions)
    stride = math.gcd(*(branch.spec.stride for branch in unsized))
    step = -(-112 // stride) * stride if step is None else step
    if step < 1 or step % stride:
        raise ValueError(
            f"sizes must divide by the strides of the branches: take a step of n x {stride}, not {step}"
        )
    if not (math.isfinite(budget_gflops) and math.isfinite(slack) and budget_gflops > 0 and slack >= 0):
        raise ValueError(f"need a budget above 0 and a slack of 0 or more, got {budget_gflops} and {slack}")
    smallest = 1 if smallest is None else smallest
    if smallest < 1:
        raise ValueError(f"the smallest size must be 1 pixel or more, got {smallest}")
    limit = budget_gflops * (1 + slack) * 1e9
    search = _Search(unsized, _image(aspect), step, limit)
    tuples = list(search.within(smallest))
    if not tuples:
        cheapest = search.cheapest(smallest)
        macs = sum(map(search.at_least, range(len(names)), cheapest))
        if macs > limit:
            raise ValueError(
                f"nothing fits {budget_gflops:g} GFLOPs: the smallest pyramid, {_joined(cheapest)}, takes "
                f"{macs / 1e9:.1f}; raise the budget, or lower the step ({step})"
                + (f" or the windows ({search.geometry.min_cells})" if search.geometry.min_cells > 1 else "")
            )
        raise ValueError(
            f"no sizes in steps of {step} within {budget_gflops:g} GFLOPs give every branch views of "
            f"{aspect} within {MOST_BENT:.0%}; raise the budget, or take another step or aspect"
        )
    return [search.plan(sizes) for sizes in _unbeaten(tuples)]


def _image(aspect: str) -> Size:
    """width:height -> (height, width) in no particular unit."""
    width, colon, height = aspect.partition(":")
    if not colon or not width.isdecimal() or not height.isdecimal() or not int(width) or not int(height):
        raise ValueError(f"aspect must be width:height in whole numbers, such as 4:3, got {aspect!r}")
    return int(height), int(width)


def _joined(sizes: Sequence[int]) -> str:
    return "/".join(map(str, reversed(sizes)))


def _common_steps(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Into how many whole steps (views/pyramid.py) the sides of the first branches fall."""
    return math.gcd(*(size // stride for size, stride in zip(sizes, strides, strict=False)))


def _unbeaten(candidates: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other is at least as large as in every branch; largest image first."""
    unbeaten: list[tuple[int, ...]] = []
    for sizes in sorted(candidates, key=lambda sizes: sizes[::-1], reverse=True):
        if not any(all(map(int.__ge__, other, sizes)) for other in unbeaten):
            unbeaten.append(sizes)
    return unbeaten


class _Search:
    """The pyramids of given branches on images of one aspect, and what they cost in multiply-accumulates."""

    def __init__(self, branches: Sequence[BranchConfig], image: Size, step: int, limit: float) -> None:
        self.vision = PiipConfig(branches=tuple(branches))
        self.geometry = self.vision.geometry()
        self.branch_cost = _costs(branches, "L")
        self.printed_cost = _costs(*_as_printed(branches))
        self.image = image
        self.ratio = min(image) / max(image)
        bent = MOST_BENT if self.ratio < 1 else 0
        self.flattest, self.squarest = self.ratio * (1 - bent), min(self.ratio * (1 + bent), 1)
        self.step = step
        self.limit = limit
        self.priced = 0
        self.ladders = [list(self.affordable(j)) for j in range(len(branches))]

    def cost(self, views: Sequence[Size]) -> int:
        return sum(map(self.branch_cost, count(), views))

    def at_least(self, j: int, size: int) -> int:
        """Branch j costs no less at this size or a larger one; off by as much as views may be bent."""
        self.priced += 1
        if self.priced > MOST_CANDIDATES:
            raise ValueError(
                f"more than {MOST_CANDIDATES} candidates; take a step above {self.step}, "
                "a larger smallest size, or a smaller budget"
            )
        stride = self.geometry.strides[j]
        return self.branch_cost(j, (max(math.ceil(size * self.flattest / stride), 1) * stride, size))

    def sizes(self, j: int) -> Iterator[int]:
        """Whole steps, each to the nearest multiple of branch j's stride, without end; the first is the least
        with room for the windows.
        """
        stride = self.geometry.strides[j]
        last = math.ceil(self.geometry.min_cells * stride / self.squarest) - 1
        for k in count(max(last // self.step, 1)):
            size = (2 * k * self.step + stride) // (2 * stride) * stride
            if size > last:
                yield size
                last = size

    def affordable(self, j: int) -> Iterator[int]:
        """The sizes that branch j alone could have."""
        return takewhile(lambda size: self.at_least(j, size) <= self.limit, self.sizes(j))

    def cheapest(self, smallest: int) -> tuple[int, ...]:
        """The smallest tuple of rising sizes."""
        sizes = [smallest - 1]
        for j in range(len(self.geometry.sides)):
            sizes.append(next(size for size in self.sizes(j) if size > sizes[-1]))
        return tuple(sizes[1:])

    def within(self, least: int, sizes: tuple[int, ...] = (), spent: int = 0) -> Iterator[tuple[int, ...]]:
        """For all sizes of the branches before it, the largest of the last branch that the limit allows.

        sizes: chosen for the first branches, which cost `spent` at least; the others rise from `least`.
        """
        j, is_last = len(sizes), len(sizes) == len(self.geometry.sides) - 1

        def spent_with(size: int) -> int:
            return spent + self.at_least(j, size)

        ladder = self.ladders[j]
        ladder = ladder[bisect_left(ladder, least) : bisect_right(ladder, self.limit, key=spent_with)]
        for size in reversed(ladder) if is_last else ladder:
            longer = (*sizes, size)
            if is_last:
                views = self.views(longer)
                if views is not None and self.cost(views) <= self.limit:
                    yield longer
                    return
            # Sides of n steps show no shape flatter than 1:n, whatever branches follow.
            elif _common_steps(longer, self.geometry.strides) * self.squarest >= 1:
                yield from self.within(size + 1, longer, spent_with(size))

    def framing(self, sizes: Sequence[int]) -> Framing:
        """Sizes that share no step show nothing but squares."""
        return "aspect" if _common_steps(sizes, self.geometry.strides) > 1 else "pad"

    def views(self, sizes: tuple[int, ...]) -> tuple[Size, ...] | None:
        """None where the views are not of these sizes or not in the shape of the image."""
        views: tuple[Size, ...]
        if self.framing(sizes) == "aspect":
            strides, min_cells = self.geometry.strides, self.geometry.min_cells
            views = pyramid_sizes(self.image, sides=sizes, strides=strides, min_cells=min_cells)
        elif self.ratio == 1:
            layout = replace(self.geometry, sides=sizes, framing="pad").layout(self.image)
            views = tuple(view.size for view in layout.views)
        else:
            return None
        fits = all(
            self.flattest <= min(view) / size <= self.squarest
            for view, size in zip(views, sizes, strict=True)
        )
        return views if fits else None

    def plan(self, sizes: tuple[int, ...]) -> Plan:
        vision = self.vision.adjusted({"framing": self.framing(sizes), "sizes": sizes})
        layout = vision.geometry().layout(self.image)
        views = tuple(view.size for view in layout.views)
        return Plan(
            vision=vision,
            views=views,
            gflops=self.cost(views) / 1e9,
            printed_gflops=sum(map(self.printed_cost, count(), views)) / 1e9,
            tokens=layout.num_visual,
        )


def _costs(branches: Sequence[BranchConfig], convention: Convention) -> Callable[[int, Size], int]:
    """What branch j costs on a view."""
    prices = branch_prices(branches, convention)

    @cache
    def cost(j: int, view: Size) -> int:
        return branch_macs(branches[j], prices[j], view)

    return cost


def _as_printed(branches: Sequence[BranchConfig]) -> tuple[list[BranchConfig], Convention]:
    """Branches as PIIP's tables count such ones: for language models (XI and XIII), with ConvNeXt (II), or as
    classifiers (the others).
    """
    families = {ENCODERS[branch.encoder].family for branch in branches}
    convention: Convention = "A"
    if families & {"clip", "convnext_clip"}:
        convention = "L"
    elif "convnext" in families:
        convention = "D"
    counted = [
        replace(branch, arguments={**branch.arguments, "window_padding": "tokens"})
        if branch.spec.window and (convention == "D" or ENCODERS[branch.encoder].family in PADS_TOKENS)
        else branch
        for branch in branches
    ]
    return counted, convention


# ---- how plans are shown --------------------------------------------------------------------------------


def plans_as_table(plans: Sequence[Plan]) -> str:
    heads = ["sizes", "GFLOPs", "PIIP prints", "tokens", "framing", "windows", "views, height x width"]
    rows = [
        [
            plan.resolution,
            f"{plan.gflops:.2f}",
            f"{plan.printed_gflops:.2f}",
            str(plan.tokens),
            plan.vision.framing,
            _joined(plan.windows),
            " ".join(f"{height}x{width}" for height, width in reversed(plan.views)),
        ]
        for plan in plans
    ]
    return aligned(heads, rows)


def plans_as_json(plans: Sequence[Plan]) -> str:
    """A list of objects; lists begin with branch 1; `views` and the largest, `image`: (height, width)."""
    entries = [
        {
            "resolution": plan.resolution,
            "encoders": [branch.encoder for branch in plan.vision.branches],
            "sizes": plan.sizes,
            "views": plan.views,
            "image": plan.views[-1],
            "framing": plan.vision.framing,
            "windows": plan.windows,
            "gflops": round(plan.gflops, 3),
            "printed_gflops": round(plan.printed_gflops, 3),
            "tokens": plan.tokens,
        }
        for plan in plans
    ]
    return json.dumps(entries, indent=2)


def plans_as_yaml(plans: Sequence[Plan]) -> str:
    """One YAML document a plan: the `model` of a chat recipe, but for its language model and tokenizer."""
    documents = []
    for plan in plans:
        height, width = plan.views[-1]
        lines = [
            f"# {plan.resolution}: {plan.gflops:.2f} GFLOPs as the papers count, "
            f"by stepwell flops RECIPE --size {width}x{height}",
            f"model:\n  vision:\n    kind: piip\n    framing: {plan.vision.framing}\n    branches:",
        ]
        for branch in plan.vision.branches:
            fields = {"encoder": branch.encoder, "size": branch.size, "arguments": branch.arguments}
            fields["interactions"] = [list(run) for run in branch.interactions]
            text = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=math.inf)
            lines.append(f"    - {text.strip()}")
        documents.append("\n".join(lines))
    return "\n---\n".join(documents)
