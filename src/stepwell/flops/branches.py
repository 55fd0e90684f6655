"""Networks as a person writes them, `deit:B,S,T` or `clip:L+convnext_clip:B` -> the branches of a pyramid.

What PIIP (arXiv 2501.07783, section IV) published for a family is the default here: its windows, and the
layers between two interactions (models/runs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from stepwell.encoders.catalogue import ENCODERS, encoder_arguments, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.prices import parameters
from stepwell.models.pyramid import BranchConfig
from stepwell.models.runs import layer_runs

__all__ = ["parse_branches", "unsized_branches"]

SIBLINGS = {"deit": "deit3", "deit3": "deit"}
"""DeiT has no L and DeiT III no T, so the paper mixes the two."""


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
    _check_known(names)
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


def unsized_branches(names: Sequence[str], *, windows: int | None, interactions: int) -> list[BranchConfig]:
    """Branches that see a single cell, until a size is chosen for each.

    names: encoders of the catalogue, largest network first. windows: side of the attention windows of plain
    transformers in cells, 0 for none; None is as published. Windows that do not divide a view are padded
    behind the qkv layer, as in PIIP's classifiers, whose costs its tables print. Raises ValueError for
    networks in another order, and for windows and interactions that they cannot have.
    """
    _check_known(names)
    _check_order(names)
    if windows is not None and windows < 0:
        raise ValueError(f"windows must be 0 (none) or positive, got {windows}")
    depths = [encoder_spec(name).depth for name in names]
    counts = [n for n in range(49) if all(_can_take(depth, n) for depth in depths)]
    if interactions not in counts:
        raise ValueError(
            f"the layers of {', '.join(names)} do not fall into {interactions} runs; "
            f"{', '.join(map(str, counts))} interactions are possible"
        )
    published = _published_windows(names)
    branches = []
    for name, depth in zip(names, depths, strict=True):
        arguments: dict[str, Any] = {}
        if ENCODERS[name].build is VisionTransformer:
            own = encoder_spec(name).window
            arguments = _window_arguments(name, (own or published) if windows is None else windows)
        runs = layer_runs(depth, interactions)
        size = encoder_spec(name).stride
        branches.append(BranchConfig(encoder=name, size=size, interactions=runs, arguments=arguments))
    return branches


def _check_known(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in ENCODERS]:
        raise ValueError(
            f"unknown encoder {unknown[0]!r}; write family:SIZES, such as deit:B,S,T, "
            f"or encoders of the catalogue: {', '.join(sorted(ENCODERS))}"
        )


def _check_order(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("a plan needs at least one branch, such as deit:B,S,T")
    for larger, smaller in pairwise(names):
        if parameters(smaller) >= parameters(larger):
            raise ValueError(
                f"parameter-inverted pyramids name the largest network first, but {smaller} "
                f"({parameters(smaller) / 1e6:.1f}M) follows {larger} ({parameters(larger) / 1e6:.1f}M)"
            )


def _published_windows(names: Sequence[str]) -> int:
    """None beside CLIP, InternViT-6B and class tokens; 14 where the largest network has 12 layers, else 28.

    Of transformers beside ConvNeXt they are 14 too.
    """
    if any(ENCODERS[name].family == "internvit" or _has_class_token(name) for name in names):
        return 0
    is_vit = ENCODERS[names[0]].build is VisionTransformer
    return 28 if is_vit and encoder_spec(names[0]).depth != 12 else 14


def _window_arguments(name: str, windows: int) -> dict[str, Any]:
    """Of a plain transformer, where the catalogue's differ."""
    if windows and _has_class_token(name):
        raise ValueError(f"{name} has a class token, which windows have no place for; take windows=0")
    if not windows and encoder_arguments(name).get("position") == "relative":
        raise ValueError(
            f"{name} has relative positions, which without windows fit a view of one size only; "
            "take windows above 0"
        )
    arguments: dict[str, Any] = {} if encoder_spec(name).window == windows else {"windows": windows}
    return {**arguments, "window_padding": "qkv"} if windows else arguments


def _has_class_token(name: str) -> bool:
    return bool(encoder_arguments(name).get("class_token"))


def _can_take(depth: int, interactions: int) -> bool:
    try:
        layer_runs(depth, interactions)
    except ValueError:
        return False
    return True
