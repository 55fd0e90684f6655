"""The names of the official PIIP code, detection, classification and LLaVA, in the words of this package.

Theirs count branches from 1, write one module per pair of branches, and call a unit's larger network
"branch 1" whatever the pair; ours are lists. Tables are made for any number of branches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from stepwell.keys.engine import Drop, Join, Rename, Rule, with_prefix

__all__ = [
    "ATTENTION",
    "INJECTOR",
    "UNIT",
    "interaction_rules",
    "interactions_rules",
    "intermediate_merge_rules",
    "merge_rules",
    "pyramid_rules",
    "token_merge_rules",
]

_RENAMED_ATTENTION = {
    "value_proj": "value",
    "sampling_offsets": "offsets",
    "attention_weights": "weights",
    "output_proj": "out",
    "wq": "query",
    "wk": "key",
    "wv": "value",
    "proj": "out",
}
ATTENTION: list[Rule] = [
    Rename(
        rf"({'|'.join(_RENAMED_ATTENTION)})\.(weight|bias)", lambda m: f"{_RENAMED_ATTENTION[m[1]]}.{m[2]}"
    )
]
"""Deformable and regular cross-attention; they share no name."""

INJECTOR: list[Rule] = [
    *with_prefix(ATTENTION, r"attn\.", "attn."),
    Rename(r"feat_norm\.(weight|bias)", r"feature_norm.\1"),
    Rename(r"((?:query|ffn)_norm|ffn\.fc[12])\.(weight|bias)", r"\1.\2"),
    Rename(r"ffn\.dwconv\.dwconv\.(weight|bias)", r"ffn.conv.\1"),
    Rename(r"ca_(?:gamma|weight)", "gate"),  # "weight" in PIIP-LLaVA, where "gamma" would be rewritten
    Rename(r"cffn_(?:gamma|weight)", "ffn_gate"),
]

UNIT: list[Rule] = [
    rule
    for i, direction in enumerate(
        ("branch2to1", "branch1to2")
    )  # the order of `Schedule` in fuse/interaction.py
    for rule in (
        Rename(rf"{direction}_proj\.(weight|bias)", rf"messages.{i}.project.\1"),
        *with_prefix(INJECTOR, rf"{direction}_injector\.", f"messages.{i}.injector."),
    )
]


def interaction_rules(num_branches: int) -> list[Rule]:
    """One interaction between neighbours, finest pair first."""
    pairs = [(a, a + 1) for a in reversed(range(1, num_branches))]
    return [
        rule
        for i, (a, b) in enumerate(pairs)
        for rule in with_prefix(UNIT, rf"interaction_units_{a}{b}\.", f"units.{i}.")
    ]


def interactions_rules(num_branches: int, count: int) -> list[Rule]:
    """`interactions.{i}.` of a whole pyramid, for `count` of them."""
    return [
        rule
        for i in range(count)
        for rule in with_prefix(
            interaction_rules(num_branches), rf"interactions\.{i}\.", f"interactions.{i}."
        )
    ]


def merge_rules(
    num_branches: int, *, source: str = "", target: str = "", layers: dict[int, int] | None = None
) -> list[Rule]:
    """`merge_branch{k}` and `w{k}` behind `source`; `layers` renumbers a stack's layers."""

    def layer(match: re.Match[str]) -> str:
        index = int(match[2])
        return f"{target}stacks.{int(match[1]) - 1}.{layers[index] if layers else index}.{match[3]}"

    name = re.escape(source)
    branch = rf"{name}_branch" if source else "merge_branch"
    weight = rf"{name}_w" if source else "w"
    numbers = range(1, num_branches + 1)
    return [
        Rename(rf"{branch}(\d+)\.(\d+)\.(weight|bias)", layer),
        Join(tuple(f"{weight}{k}" for k in numbers), f"{target}weights", torch.stack),
    ]


def intermediate_merge_rules(num_branches: int, merge_after: Sequence[int]) -> list[Rule]:
    """The merges of a backbone, one after each interaction in `merge_after`; the last has a plain name."""
    *earlier, _ = merge_after
    rules = merge_rules(num_branches, target=f"merges.{len(earlier)}.")
    for i, interaction in enumerate(earlier):
        rules += merge_rules(
            num_branches, source=f"intermediate_merging_{interaction}", target=f"merges.{i}."
        )
    return rules


def pyramid_rules(operations: Sequence[str], target: str = "neck.") -> list[Rule]:
    """`fpn1`, `fpn2` (`up1`, `up2` in single-branch baselines) as the stages that do the same."""
    rules: list[Rule] = []
    for names, operation in (("fpn1|up1", "up4"), ("fpn2|up2", "up2")):
        if operation in operations:
            stage = f"{target}stages.{list(operations).index(operation)}."
            rules.append(Rename(rf"(?:{names})\.(.+)", rf"{stage}\1"))
        else:
            rules.append(Drop(rf"(?:{names})\..+", "a resampling whose map is not returned (DINO variant)"))
    return rules


def token_merge_rules(norm: str = "groupnorm") -> list[Rule]:
    """The projector of PIIP-LLaVA; its stacks hold reshaping layers that ours do without."""
    layers = {"1": 0, "3": 1, "6": 3} if norm == "groupnorm" else {"1": 0, "5": 3}

    def place(match: re.Match[str]) -> str:
        return f"stacks.{int(match[1]) - 1}.{layers[match[2]]}.{match[3]}"

    return [Rename(rf"branch(\d+)\.({'|'.join(layers)})\.(weight|bias)", place)]
