"""The best pyramids under a budget: which picture size to give to each of several networks.

PIIP (arXiv 2501.07783, section V) chooses its sizes by hand. Here every tuple is priced in closed form. A
larger pyramid always costs more, so within a budget size decides: a tuple is beaten by one that is at least
as large in every branch. Sizes are strictly ordered and parameter-inverted: branch 1 is the largest network
and sees the smallest picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from stepwell.encoders.catalogue import ENCODERS
from stepwell.flops.branches import parse_branches
from stepwell.flops.cost import CONVENTIONS
from stepwell.flops.pyramid import Merge, PyramidCost, as_counted
from stepwell.flops.shapes import VitShape, shape_of
from stepwell.flops.text import aligned
from stepwell.models.runs import STAGE_MERGES, layer_runs
from stepwell.models.settings import BranchConfig, InteractionConfig
from stepwell.structures import Size
from stepwell.views.pyramid import pyramid_sizes

__all__ = ["Plan", "plan", "plans_as_json", "plans_as_table", "plans_as_yaml"]

MOST_CANDIDATES = 100_000
MOST_BENT = 0.05
"""How far the views' aspect may be from the one asked for: 1120/896/448 at 4:3 is 4.8 % off."""
MERGES: dict[str, Merge] = {"A": "linear", "D": "stages", "L": "none"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One tuple of sizes. `branches` and `views` begin with branch 1; GFLOPs are 1e9 multiply-accumulates."""

    branches: tuple[BranchConfig, ...]
    views: tuple[Size, ...]
    gflops: float
    tokens: int  # cells of the last branch

    @property
    def sizes(self) -> tuple[int, ...]:
        """Long sides, branch 1 first."""
        return tuple(branch.size for branch in self.branches)

    @property
    def windows(self) -> tuple[int | tuple[int, ...], ...]:
        """Sides of the attention windows in cells, branch 1 first; 0 where attention is global."""
        return tuple(_windows(branch) for branch in self.branches)

    @property
    def resolution(self) -> str:
        """As the papers print it, the largest picture first."""
        return _joined(self.sizes)


def _windows(branch: BranchConfig) -> int | tuple[int, ...]:
    shape = shape_of(branch.encoder, branch.arguments)
    return shape.windows if isinstance(shape, VitShape) else 0


def _joined(sizes: Sequence[int]) -> str:
    return "/".join(map(str, reversed(sizes)))


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
    """Every tuple of sizes within the budget that no other beats, largest picture first.

    branches: as `parse_branches` takes them, or encoders of the catalogue, largest network first.
    budget_gflops: in 1e9 multiply-accumulates, as the paper's tables count such branches; tuples up to
    `slack` above it are kept, because printed budgets are rounded. step: sizes are its multiples, each
    rounded to the stride of its own branch; by default 112, or the next multiple of the smallest stride.
    aspect: width:height of the pictures, whose long side is the size; tuples whose views would be off by
    more than 5 % are left out. smallest: least size of branch 1, by default one step. windows: side of the
    attention windows, 0 for none; by default as published.
    Raises ValueError for settings that make no sense, and where nothing fits the budget.
    """
    names = parse_branches(branches) if isinstance(branches, str) else list(branches)
    _check_order(names)
    stride = math.gcd(*(shape_of(name).strides[-1] for name in names))
    step = -(-112 // stride) * stride if step is None else step
    if step < 1 or step % stride:
        raise ValueError(
            f"sizes must divide by the strides of the branches: take a step of n x {stride}, not {step}"
        )
    if not (math.isfinite(budget_gflops) and math.isfinite(slack) and budget_gflops > 0 and slack >= 0):
        raise ValueError(f"need a budget above 0 and a slack of 0 or more, got {budget_gflops} and {slack}")
    if smallest is not None and smallest < 1:
        raise ValueError(f"the smallest size must be 1 pixel or more, got {smallest}")
    priced = _Priced(names, _picture(aspect), step=step, windows=windows, interactions=interactions)
    first = priced.next_size(0, (smallest or 1) - 1)
    found = priced.within(budget_gflops * (1 + slack), first)
    if not found:
        cheapest = priced.next_sizes((first,))
        gflops = priced.at_least(cheapest)
        if gflops > budget_gflops * (1 + slack):
            raise ValueError(
                f"nothing fits {budget_gflops:g} GFLOPs: the smallest pyramid, {_joined(cheapest)}, takes "
                f"{gflops:.1f}; raise the budget or lower the step ({step})"
            )
        raise ValueError(
            f"no sizes in steps of {step} within {budget_gflops:g} GFLOPs give every branch views of "
            f"{aspect} within {MOST_BENT:.0%}; raise the budget, or take another step or aspect"
        )
    return [priced.plan(sizes) for sizes in _unbeaten(found)]


def _check_order(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("a plan needs at least one branch, such as deit:B,S,T")
    params = [shape_of(name).cost((16, 16), CONVENTIONS["D"]).params for name in names]
    for j in range(1, len(names)):
        if params[j] >= params[j - 1]:
            raise ValueError(
                f"parameter-inverted pyramids name the largest network first, but {names[j]} "
                f"({params[j] / 1e6:.1f}M) follows {names[j - 1]} ({params[j - 1] / 1e6:.1f}M)"
            )


def _picture(aspect: str) -> Size:
    """width:height -> (height, width) in no particular unit."""
    width, colon, height = aspect.partition(":")
    if not colon or not width.isdecimal() or not height.isdecimal() or not int(width) or not int(height):
        raise ValueError(f"aspect must be width:height in whole numbers, such as 4:3, got {aspect!r}")
    return int(height), int(width)


class _Priced:
    """The pyramids of given networks on pictures of one aspect, and what they cost."""

    def __init__(
        self,
        names: Sequence[str],
        picture: Size,
        *,
        step: int,
        windows: int | None,
        interactions: int,
    ) -> None:
        self.picture = picture
        self.ratio = min(picture) / max(picture)
        self.step = step
        families = [ENCODERS[name].family for name in names]
        convention = _convention(families)
        self.branches = _branches(names, windows, interactions)
        merge = MERGES[convention]
        if merge == "stages" and interactions != 12:  # merging by stages is defined for twelve
            merge = "dense"
        self.cost = PyramidCost(
            [as_counted(branch, convention) for branch in self.branches],
            InteractionConfig(),
            CONVENTIONS[convention],
            merge=merge,
            merge_after=STAGE_MERGES if merge == "stages" else (),
            num_classes=1000 if convention == "A" else None,
        )
        self.strides = [shape.strides[-1] for shape in self.cost.shapes]
        self.priced = 0

    def views(self, sizes: Sequence[int]) -> tuple[Size, ...] | None:
        """None where the sizes share too few steps to show the picture in its shape."""
        if self.picture[0] == self.picture[1]:
            return tuple((size, size) for size in sizes)
        if self._steps(sizes) < 2:
            return None
        views = pyramid_sizes(self.picture, sides=sizes, strides=self.strides)
        short, long = sorted(views[-1])
        return views if abs(short / long / self.ratio - 1) <= MOST_BENT else None

    def _steps(self, sizes: Sequence[int]) -> int:
        """Into how many whole steps (views/pyramid.py) the long sides fall."""
        return math.gcd(*(size // stride for size, stride in zip(sizes, self.strides, strict=False)))

    def _count(self) -> None:
        self.priced += 1
        if self.priced > MOST_CANDIDATES:
            raise ValueError(
                f"more than {MOST_CANDIDATES} candidates; take a step above {self.step}, "
                "a larger smallest size, or a smaller budget"
            )

    def next_size(self, j: int, size: int) -> int:
        """Branch j's smallest candidate above `size`."""
        k = max(1, (size - self.strides[j]) // self.step)
        while self._rounded(j, k) <= size:
            k += 1
        return self._rounded(j, k)

    def _rounded(self, j: int, k: int) -> int:
        """k steps, to the nearest multiple of branch j's stride."""
        stride = self.strides[j]
        return max((2 * k * self.step + stride) // (2 * stride), 1) * stride

    def next_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest tuple that begins with `sizes`."""
        for j in range(len(sizes), len(self.branches)):
            sizes = (*sizes, self.next_size(j, sizes[-1]))
        return sizes

    def plan(self, sizes: tuple[int, ...]) -> Plan:
        views = self.views(sizes)
        assert views is not None
        cost = self.cost.cost(views)
        branches = tuple(replace(b, size=size) for b, size in zip(self.branches, sizes, strict=True))
        height, width = views[-1]
        tokens = (height // self.strides[-1]) * (width // self.strides[-1])
        return Plan(branches=branches, views=views, gflops=cost.macs / 1e9, tokens=tokens)

    def within(self, limit: float, first: int) -> list[tuple[int, ...]]:
        """For all sizes of the branches before it, the largest of the last branch that the limit allows."""
        return list(self._extend((), limit, first))

    def _extend(self, sizes: tuple[int, ...], limit: float, first: int) -> Iterator[tuple[int, ...]]:
        j = len(sizes)
        size = self.next_size(j, sizes[-1]) if sizes else first
        if j == len(self.branches) - 1:
            yield from self._largest(sizes, limit, size)
            return
        while self.at_least(self.next_sizes((*sizes, size))) <= limit:
            candidate = (*sizes, size)
            # Sides of n steps show no shape flatter than 1:n, whatever branches follow.
            if self._steps(candidate) * self.ratio * (1 + MOST_BENT) >= 1:
                yield from self._extend(candidate, limit, first)
            size = self.next_size(j, size)

    def _largest(self, sizes: tuple[int, ...], limit: float, size: int) -> Iterator[tuple[int, ...]]:
        """At most one: bisected by the bound, then down to the first that truly fits."""
        low = size // self.step
        above = low + 1
        while self.at_least((*sizes, self._rounded(-1, above))) <= limit:
            low, above = above, 2 * above
        while above - low > 1:
            middle = (low + above) // 2
            if self.at_least((*sizes, self._rounded(-1, middle))) <= limit:
                low = middle
            else:
                above = middle
        for k in range(low, 0, -1):
            candidate = (*sizes, self._rounded(-1, k))
            if candidate[-1] < size:
                return
            self._count()
            views = self.views(candidate)
            if views is not None and self.cost.cost(views).macs / 1e9 <= limit:
                yield candidate
                return

    def at_least(self, sizes: Sequence[int]) -> float:
        """No pyramid whose sizes are these or larger costs less; off by as much as views may be bent."""
        self._count()
        bent = self.ratio * (1 - MOST_BENT) if self.ratio < 1 else 1
        views = [
            (max(math.ceil(size * bent / stride), 1) * stride, size)
            for size, stride in zip(sizes, self.strides, strict=True)
        ]
        return self.cost.cost(views).macs / 1e9


def _convention(families: Sequence[str]) -> str:
    if "clip" in families:
        return "L"
    return "D" if "convnext" in families else "A"


def _branches(names: Sequence[str], windows: int | None, interactions: int) -> list[BranchConfig]:
    """Branches whose sizes are still to be chosen.

    Published windows: none for CLIP and InternViT-6B, 14 where the largest network has 12 layers, else 28.
    """
    shapes = [shape_of(name) for name in names]
    if windows is None:
        windows = 14 if len(shapes[0].dims) == 12 or not isinstance(shapes[0], VitShape) else 28
        if any(ENCODERS[name].family in ("clip", "internvit") for name in names):
            windows = 0
    if windows < 0:
        raise ValueError(f"windows must be 0 (none) or positive, got {windows}")
    counts = [n for n in range(49) if all(_can_take(len(shape.dims), n) for shape in shapes)]
    if interactions not in counts:
        raise ValueError(
            f"the layers of {', '.join(names)} do not fall into {interactions} runs; "
            f"{', '.join(map(str, counts))} interactions are possible"
        )
    branches = []
    for name, shape in zip(names, shapes, strict=True):
        arguments: dict[str, Any] = {}
        if isinstance(shape, VitShape) and shape.windows != windows:
            if shape.class_token:
                raise ValueError(f"{name} has a class token, which windows have no place for; take windows=0")
            arguments["windows"] = windows
        runs = layer_runs(len(shape.dims), interactions)
        branches.append(BranchConfig(encoder=name, size=1, interactions=runs, arguments=arguments))
    return branches


def _can_take(depth: int, interactions: int) -> bool:
    try:
        return bool(layer_runs(depth, interactions)) or not interactions
    except ValueError:
        return False


def _unbeaten(candidates: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other is at least as large as in every branch; largest picture first."""
    kept: list[tuple[int, ...]] = []
    for sizes in sorted(candidates, key=lambda sizes: sizes[::-1], reverse=True):
        if not any(all(map(int.__ge__, other, sizes)) for other in kept):
            kept.append(sizes)
    return kept


# ---- how plans are shown --------------------------------------------------------------------------------


def plans_as_table(plans: Sequence[Plan]) -> str:
    heads = ["sizes", "GFLOPs", "cells", "windows", "views, height x width"]
    rows = [
        [
            plan.resolution,
            f"{plan.gflops:.1f}",
            str(plan.tokens),
            "/".join(str(windows) for windows in reversed(plan.windows)),
            " ".join(f"{height}x{width}" for height, width in reversed(plan.views)),
        ]
        for plan in plans
    ]
    return aligned(heads, rows)


def plans_as_json(plans: Sequence[Plan]) -> str:
    """A list of objects; lists begin with branch 1; `views` and the largest, `picture`: (height, width)."""
    entries = [
        {
            "resolution": plan.resolution,
            "encoders": [branch.encoder for branch in plan.branches],
            "sizes": plan.sizes,
            "views": plan.views,
            "picture": plan.views[-1],
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
        strides = [shape_of(branch.encoder).strides[-1] for branch in plan.branches]
        steps = math.gcd(*(size // stride for size, stride in zip(plan.sizes, strides, strict=True)))
        lines = [
            f"# {plan.resolution}: {plan.gflops:.1f} GFLOPs",
            "vision:",
            "  kind: piip",
            f"  framing: {'aspect' if steps > 1 else 'pad'}",  # sides without a common step: squares only
        ]
        lines.append("  branches:")
        for branch in plan.branches:
            runs = [list(run) for run in branch.interactions]
            fields = {"encoder": branch.encoder, "size": branch.size, "arguments": branch.arguments}
            text = yaml.safe_dump(
                {**fields, "interactions": runs}, default_flow_style=True, sort_keys=False, width=math.inf
            )
            lines.append(f"  - {text.strip()}")
        documents.append("\n".join(lines))
    return "\n---\n".join(documents)
