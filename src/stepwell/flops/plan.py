"""The best pyramids under a budget: which image size to give to each of several networks.

PIIP (arXiv 2501.07783, section V) chooses its sizes by hand. Here every tuple is priced (flops/prices.py). A
larger pyramid always costs more, so within a budget size decides: a tuple is beaten by one that is at least
as large in every branch. Sizes are strictly ordered and parameter-inverted: branch 1 is the largest network
and sees the smallest image.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, pairwise, takewhile
from typing import Any

import yaml

from stepwell.encoders.catalogue import ENCODERS, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import PADS_TOKENS, Convention
from stepwell.flops.prices import branch_prices, parameters, quantities
from stepwell.flops.text import aligned
from stepwell.models.pyramid import BranchConfig
from stepwell.models.runs import layer_runs
from stepwell.structures import Size
from stepwell.views.pyramid import pyramid_sizes

__all__ = ["Plan", "parse_branches", "plan", "plans_as_json", "plans_as_table", "plans_as_yaml"]

MOST_CANDIDATES = 300_000
"""Looks at what a branch costs at a size."""
MOST_BENT = 0.05
"""How far the views' aspect may be from the one asked for: 1120/896/448 at 4:3 is 4.8 % off."""
SIBLINGS = {"deit": "deit3", "deit3": "deit"}
"""DeiT has no L and DeiT III no T, so the paper mixes the two."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One tuple of sizes. `branches` and `views` begin with branch 1; GFLOPs are 1e9 multiply-accumulates."""

    branches: tuple[BranchConfig, ...]
    views: tuple[Size, ...]
    windows: tuple[int, ...]  # sides of the attention windows in cells, 0 where attention is global
    gflops: float
    tokens: int  # cells of the last branch

    @property
    def sizes(self) -> tuple[int, ...]:
        """Long sides, branch 1 first."""
        return tuple(branch.size for branch in self.branches)

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
    budget_gflops: in 1e9 multiply-accumulates, as the paper's tables count such branches; tuples up to
    `slack` above it are kept, because printed budgets are rounded. step: sizes are its multiples, each
    rounded to the stride of its own branch; by default 112, or the next multiple of the smallest stride.
    aspect: width:height of the images, whose long side is the size; tuples whose views would be off by
    more than 5 % are left out. smallest: least size of branch 1, by default one step. windows: side of the
    attention windows, 0 for none; by default as published.
    Raises ValueError for settings that make no sense, and where nothing fits the budget.
    """
    names = parse_branches(branches) if isinstance(branches, str) else list(branches)
    _check_order(names)
    stride = math.gcd(*(encoder_spec(name).stride for name in names))
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
    search = _Search(_branches(names, windows, interactions), _image(aspect), step, limit)
    tuples = list(search.within(smallest))
    if not tuples:
        cheapest = search.cheapest(smallest)
        macs = sum(map(search.at_least, range(len(names)), cheapest))
        if macs > limit:
            raise ValueError(
                f"nothing fits {budget_gflops:g} GFLOPs: the smallest pyramid, {_joined(cheapest)}, takes "
                f"{macs / 1e9:.1f}; raise the budget or lower the step ({step})"
            )
        raise ValueError(
            f"no sizes in steps of {step} within {budget_gflops:g} GFLOPs give every branch views of "
            f"{aspect} within {MOST_BENT:.0%}; raise the budget, or take another step or aspect"
        )
    return [search.plan(sizes) for sizes in _unbeaten(tuples)]


def parse_branches(text: str) -> list[str]:
    """`deit:B,S,T` or `clip:L + convnext_clip:B` -> encoders of the catalogue, largest network first.

    A family that lacks a size borrows it from its sibling (`deit:L` is DeiT III's). Raises ValueError for
    what the catalogue does not have.
    """
    names = []
    for group in text.lower().split("+"):
        family, colon, sizes = (part.strip() for part in group.partition(":"))
        if not all(size.strip() for size in (sizes if colon else family).split(",")):
            raise ValueError(f"{text!r} lacks a size between its commas or behind them; write deit:B,S,T")
        names += [_encoder(family, size.strip()) for size in sizes.split(",")] if colon else [family]
    if unknown := [name for name in names if name not in ENCODERS]:
        raise ValueError(
            f"unknown encoder {unknown[0]!r}; write family:SIZES, such as deit:B,S,T, "
            f"or encoders of the catalogue: {', '.join(sorted(ENCODERS))}"
        )
    return names


def _encoder(family: str, size: str) -> str:
    members = [name for name, entry in ENCODERS.items() if entry.family == family]
    if not members:
        families = sorted({entry.family for entry in ENCODERS.values()})
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(families)}")
    stem, _, suffix = family.partition("_")  # convnext_clip names its encoders convnext_b_clip
    for member in (stem, SIBLINGS.get(stem, stem)):
        name = "_".join(filter(None, (member, size, suffix)))
        if name in ENCODERS:
            return name
    raise ValueError(f"{family} has no size {size.upper()!r}; the catalogue has {', '.join(members)}")


def _check_order(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("a plan needs at least one branch, such as deit:B,S,T")
    for larger, smaller in pairwise(names):
        if parameters(smaller) >= parameters(larger):
            raise ValueError(
                f"parameter-inverted pyramids name the largest network first, but {smaller} "
                f"({parameters(smaller) / 1e6:.1f}M) follows {larger} ({parameters(larger) / 1e6:.1f}M)"
            )


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


def _branches(names: Sequence[str], windows: int | None, interactions: int) -> list[BranchConfig]:
    """Branches whose sizes are still to be chosen.

    Published windows: none for CLIP and InternViT-6B, 14 where the largest network has 12 layers, else 28.
    """
    depths = [encoder_spec(name).depth for name in names]
    if windows is None:
        windows = 14 if depths[0] == 12 or not _is_vit(names[0]) else 28
        if any(ENCODERS[name].family in ("clip", "internvit") for name in names):
            windows = 0
    if windows < 0:
        raise ValueError(f"windows must be 0 (none) or positive, got {windows}")
    counts = [n for n in range(49) if all(_can_take(depth, n) for depth in depths)]
    if interactions not in counts:
        raise ValueError(
            f"the layers of {', '.join(names)} do not fall into {interactions} runs; "
            f"{', '.join(map(str, counts))} interactions are possible"
        )
    branches = []
    for name, depth in zip(names, depths, strict=True):
        arguments: dict[str, Any] = {}
        if _is_vit(name) and encoder_spec(name).window != windows:
            if ENCODERS[name].arguments.get("class_token"):
                raise ValueError(f"{name} has a class token, which windows have no place for; take windows=0")
            arguments["windows"] = windows
        runs = layer_runs(depth, interactions)
        branches.append(BranchConfig(encoder=name, size=1, interactions=runs, arguments=arguments))
    return branches


def _is_vit(name: str) -> bool:
    return ENCODERS[name].build is VisionTransformer


def _can_take(depth: int, interactions: int) -> bool:
    try:
        layer_runs(depth, interactions)
    except ValueError:
        return False
    return True


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
        families = [ENCODERS[branch.encoder].family for branch in branches]
        convention: Convention = "L" if "clip" in families else "D" if "convnext" in families else "A"
        self.branches = branches
        self.prices = branch_prices(branches, convention)
        self.padded = [convention != "A" or family in PADS_TOKENS for family in families]
        self.specs = [encoder_spec(branch.encoder, branch.arguments) for branch in branches]
        self.strides = [spec.stride for spec in self.specs]
        self.image = image
        self.ratio = min(image) / max(image)
        self.step = step
        self.limit = limit
        self.branch_cost = cache(self._branch_cost)
        self.priced = 0
        self.ladders = [list(self.affordable(j)) for j in range(len(branches))]

    def _branch_cost(self, j: int, view: Size) -> int:
        amounts = quantities(self.specs[j], view, padded=self.padded[j])
        return sum(price * amounts[name] for name, price in self.prices[j].items())

    def cost(self, views: Sequence[Size]) -> int:
        return sum(map(self.branch_cost, range(len(views)), views))

    def at_least(self, j: int, size: int) -> int:
        """Branch j costs no less at this size or a larger one; off by as much as views may be bent."""
        self.priced += 1
        if self.priced > MOST_CANDIDATES:
            raise ValueError(
                f"more than {MOST_CANDIDATES} candidates; take a step above {self.step}, "
                "a larger smallest size, or a smaller budget"
            )
        bent = self.ratio * (1 - MOST_BENT) if self.ratio < 1 else 1
        return self.branch_cost(j, (max(math.ceil(size * bent / self.strides[j]), 1) * self.strides[j], size))

    def sizes(self, j: int) -> Iterator[int]:
        """Whole steps, each to the nearest multiple of branch j's stride, without end."""
        stride, last = self.strides[j], 0
        for k in count(1):
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
        for j in range(len(self.branches)):
            sizes.append(next(size for size in self.sizes(j) if size > sizes[-1]))
        return tuple(sizes[1:])

    def within(self, least: int, sizes: tuple[int, ...] = (), spent: int = 0) -> Iterator[tuple[int, ...]]:
        """For all sizes of the branches before it, the largest of the last branch that the limit allows.

        sizes: chosen for the first branches, which cost `spent` at least; the others rise from `least`.
        """
        j, is_last = len(sizes), len(sizes) == len(self.branches) - 1

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
            elif _common_steps(longer, self.strides) * self.ratio * (1 + MOST_BENT) >= 1:
                yield from self.within(size + 1, longer, spent_with(size))

    def views(self, sizes: Sequence[int]) -> tuple[Size, ...] | None:
        """None where the sizes share too few steps to show the image in its shape."""
        if self.ratio == 1:
            return tuple((size, size) for size in sizes)
        if _common_steps(sizes, self.strides) < 2:
            return None
        views = pyramid_sizes(self.image, sides=sizes, strides=self.strides)
        short, long = sorted(views[-1])
        return views if abs(short / long / self.ratio - 1) <= MOST_BENT else None

    def plan(self, sizes: tuple[int, ...]) -> Plan:
        views = self.views(sizes)
        assert views is not None
        return Plan(
            branches=tuple(replace(b, size=size) for b, size in zip(self.branches, sizes, strict=True)),
            views=views,
            windows=tuple(spec.window for spec in self.specs),
            gflops=self.cost(views) / 1e9,
            tokens=math.prod(side // self.strides[-1] for side in views[-1]),
        )


# ---- how plans are shown --------------------------------------------------------------------------------


def plans_as_table(plans: Sequence[Plan]) -> str:
    heads = ["sizes", "GFLOPs", "cells", "windows", "views, height x width"]
    rows = [
        [
            plan.resolution,
            f"{plan.gflops:.1f}",
            str(plan.tokens),
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
            "encoders": [branch.encoder for branch in plan.branches],
            "sizes": plan.sizes,
            "views": plan.views,
            "image": plan.views[-1],
            "windows": plan.windows,
            "gflops": round(plan.gflops, 3),
            "tokens": plan.tokens,
        }
        for plan in plans
    ]
    return json.dumps(entries, indent=2)


def plans_as_yaml(plans: Sequence[Plan]) -> str:
    """One YAML document a plan: the `vision` of a recipe's `model`."""
    documents = []
    for plan in plans:
        strides = [encoder_spec(branch.encoder).stride for branch in plan.branches]
        framing = "aspect" if _common_steps(plan.sizes, strides) > 1 else "pad"  # else squares only
        lines = [f"# {plan.resolution}: {plan.gflops:.1f} GFLOPs", "vision:", "  kind: piip"]
        lines += [f"  framing: {framing}", "  branches:"]
        for branch in plan.branches:
            fields = {"encoder": branch.encoder, "size": branch.size, "arguments": branch.arguments}
            fields["interactions"] = [list(run) for run in branch.interactions]
            text = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=math.inf)
            lines.append(f"  - {text.strip()}")
        documents.append("\n".join(lines))
    return "\n---\n".join(documents)
