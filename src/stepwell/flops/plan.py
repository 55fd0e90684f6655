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
from stepwell.flops.cost import CONVENTIONS
from stepwell.flops.pyramid import Merge, PyramidCost, as_counted
from stepwell.flops.shapes import VitShape, shape_of
from stepwell.flops.text import aligned
from stepwell.models.config import BranchConfig, InteractionConfig
from stepwell.models.published import STAGE_MERGES, layer_runs
from stepwell.structures import Size
from stepwell.views.pyramid import pyramid_sizes

__all__ = ["Plan", "parse_branches", "plan", "plans_as_json", "plans_as_table", "plans_as_yaml"]

MOST_CANDIDATES = 1_000_000
SIBLINGS = {"deit": "deit3", "deit3": "deit"}
"""DeiT has no L and DeiT III no T, so the paper mixes the two."""
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
    def resolution(self) -> str:
        """As the papers print it, the largest picture first."""
        return _joined(self.sizes)


def _joined(sizes: Sequence[int]) -> str:
    return "/".join(map(str, reversed(sizes)))


def parse_branches(text: str) -> list[str]:
    """`deit:B,S,T` or `clip:L + convnext:B` -> encoders of the catalogue, largest network first.

    A family that lacks a size borrows it from its sibling (`deit:L` is DeiT III's). Raises ValueError for
    what the catalogue does not have.
    """
    names = []
    for group in text.split("+"):
        family, colon, sizes = (part.strip() for part in group.partition(":"))
        if not colon:
            names.append(family)
            continue
        for size in sizes.split(","):
            names.append(_encoder(family, size.strip().lower()))
    if unknown := [name for name in names if name not in ENCODERS]:
        raise ValueError(
            f"unknown encoder {unknown[0]!r}; write family:SIZES, such as deit:B,S,T, "
            f"or encoders of the catalogue: {', '.join(sorted(ENCODERS))}"
        )
    return names


def _encoder(family: str, size: str) -> str:
    families = sorted({entry.family for entry in ENCODERS.values()})
    if family not in families:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(families)}")
    stem, _, suffix = family.partition("_")  # convnext_clip names its encoders convnext_b_clip
    names = [
        f"{member}_{size}" + (f"_{suffix}" if suffix else "") for member in (stem, SIBLINGS.get(stem, stem))
    ]
    for name in names:
        if name in ENCODERS:
            return name
    known = [name for name, entry in ENCODERS.items() if entry.family == family]
    raise ValueError(f"{family} has no size {size.upper()!r}; the catalogue has {', '.join(known)}")


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
    convention: str | None = None,
) -> list[Plan]:
    """Every tuple of sizes within the budget that no other beats, largest picture first.

    branches: as `parse_branches` takes them, or encoders of the catalogue, largest network first.
    budget_gflops: in 1e9 multiply-accumulates, as the papers print them; tuples up to `slack` above it are
    kept, because printed budgets are rounded. step: sizes are its multiples; by default 112, or the next
    multiple of all strides. aspect: width:height of the pictures, whose long side is the size. smallest:
    least size of branch 1, by default one step. windows: side of the attention windows, 0 for none; by
    default as published. convention: A, D or L of flops/cost.py; by default that of the paper's tables for
    such branches.
    Raises ValueError for settings that make no sense, and where nothing fits the budget.
    """
    names = parse_branches(branches) if isinstance(branches, str) else list(branches)
    _check_order(names)
    stride = math.lcm(*(shape_of(name).strides[-1] for name in names))
    step = -(-112 // stride) * stride if step is None else step
    if step < 1 or step % stride:
        raise ValueError(
            f"sizes must divide by the strides of all branches: take a step of n x {stride}, not {step}"
        )
    if not budget_gflops > 0 or not slack >= 0:
        raise ValueError(f"need a budget above 0 and a slack of 0 or more, got {budget_gflops} and {slack}")
    picture = _picture(aspect)
    if picture[0] != picture[1] and step < 2 * stride:
        raise ValueError(f"a step of {step} leaves room for square pictures only; take at least {2 * stride}")
    priced = _Priced(
        names, picture, step=step, windows=windows, interactions=interactions, convention=convention
    )
    limit = budget_gflops * (1 + slack)
    first = step if smallest is None else -(-smallest // step) * step
    found = priced.within(limit, first)
    if not found:
        cheapest = tuple(first + i * step for i in range(len(names)))
        raise ValueError(
            f"nothing fits {budget_gflops:g} GFLOPs: the smallest pyramid, {_joined(cheapest)}, takes "
            f"{priced.gflops(cheapest):.1f}; raise the budget or lower the step ({step})"
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
        convention: str | None,
    ) -> None:
        self.picture = picture
        self.step = step
        families = [ENCODERS[name].family for name in names]
        convention = _convention(families) if convention is None else convention
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}; choose from {', '.join(CONVENTIONS)}")
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

    def views(self, sizes: Sequence[int]) -> tuple[Size, ...]:
        if self.picture[0] == self.picture[1]:
            return tuple((size, size) for size in sizes)
        return pyramid_sizes(self.picture, sides=sizes, strides=self.strides)

    def gflops(self, sizes: Sequence[int]) -> float:
        self.priced += 1
        if self.priced > MOST_CANDIDATES:
            raise ValueError(
                f"more than {MOST_CANDIDATES} candidates; take a step above {self.step}, a smallest size, "
                "or a smaller budget"
            )
        return self.cost.cost(self.views(sizes)).macs / 1e9

    def plan(self, sizes: tuple[int, ...]) -> Plan:
        views = self.views(sizes)
        cost = self.cost.cost(views)
        branches = tuple(replace(b, size=size) for b, size in zip(self.branches, sizes, strict=True))
        height, width = views[-1]
        tokens = (height // self.strides[-1]) * (width // self.strides[-1])
        return Plan(branches=branches, views=views, gflops=cost.macs / 1e9, tokens=tokens)

    def within(self, limit: float, first: int) -> list[tuple[int, ...]]:
        """For all sizes of the branches before it, the largest of the last branch that the limit allows."""
        return list(self._extend((), limit, first))

    def _extend(self, sizes: tuple[int, ...], limit: float, first: int) -> Iterator[tuple[int, ...]]:
        rest = len(self.branches) - len(sizes)
        best: tuple[int, ...] | None = None
        size = sizes[-1] + self.step if sizes else first
        while self._at_least((*sizes, *(size + i * self.step for i in range(rest)))) <= limit:
            candidate = (*sizes, size)
            if rest > 1:
                yield from self._extend(candidate, limit, first)
            elif self.gflops(candidate) <= limit:
                best = candidate
            size += self.step
        if best is not None:
            yield best

    def _at_least(self, sizes: Sequence[int]) -> float:
        """No pyramid whose sizes are these or larger costs less; rounding to whole cells is allowed for."""
        short, long = min(self.picture), max(self.picture)
        if short == long:
            return self.gflops(sizes)
        ratio = short / long - 0.5 / (self.step // math.lcm(*self.strides))
        views = [
            (max(int(size * ratio) // stride * stride, stride), size)
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


def _unbeaten(candidates: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other is at least as large as in every branch; largest picture first."""
    kept: list[tuple[int, ...]] = []
    for sizes in sorted(candidates, key=lambda sizes: sizes[::-1], reverse=True):
        if not any(all(map(int.__ge__, other, sizes)) for other in kept):
            kept.append(sizes)
    return kept


# ---- how plans are shown --------------------------------------------------------------------------------


def plans_as_table(plans: Sequence[Plan]) -> str:
    heads = ["sizes", "GFLOPs", "cells", "views, height x width"]
    rows = [
        [
            plan.resolution,
            f"{plan.gflops:.1f}",
            str(plan.tokens),
            " ".join(f"{height}x{width}" for height, width in reversed(plan.views)),
        ]
        for plan in plans
    ]
    return aligned(heads, rows)


def plans_as_json(plans: Sequence[Plan]) -> str:
    """A list of objects; `sizes`, `views` (height, width) and `encoders` begin with branch 1."""
    entries = [
        {
            "resolution": plan.resolution,
            "encoders": [branch.encoder for branch in plan.branches],
            "sizes": plan.sizes,
            "views": plan.views,
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
        lines = [
            f"# {plan.resolution}: {plan.gflops:.1f} GFLOPs",
            "vision:",
            "  kind: piip",
            "  framing: aspect",
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
