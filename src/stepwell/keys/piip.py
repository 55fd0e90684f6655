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
    "classifier_rules",
    "encoder_rules",
    "features_rules",
    "interaction_rules",
    "linear_merge_rules",
    "merge_rules",
    "pyramid_rules",
    "token_merge_rules",
    "vision_rules",
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


def encoder_rules(branches: Sequence[Sequence[Rule]], num_interactions: int) -> list[Rule]:
    """`branch{k}.` and `interactions.{i}.` -> PyramidEncoder, as `encoder`. branches: their tables.

    A network that is alone has its names without a prefix.
    """
    rules: list[Rule] = []
    for k, branch in enumerate(branches):
        source = rf"branch{k + 1}\." if len(branches) > 1 else ""
        rules += with_prefix(branch, source, f"encoder.branches.{k}.")
    for i in range(num_interactions):
        rules += with_prefix(
            interaction_rules(len(branches)), rf"interactions\.{i}\.", f"encoder.interactions.{i}."
        )
    return rules


def merge_rules(num_branches: int, target: str, interaction: int | None = None) -> list[Rule]:
    """The last merge of a dense model, or the one after an interaction that is not the last."""
    name = "merge_branch" if interaction is None else f"intermediate_merging_{interaction}_branch"
    weight = "w" if interaction is None else f"intermediate_merging_{interaction}_w"

    def layer(match: re.Match[str]) -> str:
        return f"{target}stacks.{int(match[1]) - 1}.{match[2]}"

    return [
        Rename(rf"{name}(\d+)\.(\d+\.(?:weight|bias))", layer),
        _sum_weights(weight, num_branches, target),
    ]


def linear_merge_rules(num_branches: int, target: str) -> list[Rule]:
    """The merge of a classifier: a norm alone in branch 1; elsewhere our three layers have other numbers."""
    layers = {"0": 0, "2": 1, "4": 2}

    def layer(match: re.Match[str]) -> str:
        return f"{target}stacks.{int(match[1]) - 1}.{layers[match[2]]}.{match[3]}"

    return [
        Rename(r"merge_branch1\.(weight|bias)", rf"{target}stacks.0.\1"),
        Rename(r"merge_branch(\d+)\.([024])\.(weight|bias)", layer),
        _sum_weights("w", num_branches, target),
    ]


def _sum_weights(name: str, num_branches: int, target: str) -> Join:
    scalars = tuple(f"{name}{k}" for k in range(1, num_branches + 1))
    return Join(scalars, f"{target}weights", torch.stack)


def features_rules(
    branches: Sequence[Sequence[Rule]],
    num_interactions: int,
    *,
    merge_after: Sequence[int] = (),
    operations: Sequence[str] = (),
) -> list[Rule]:
    """A dense backbone -> PyramidFeatures.

    branches: every encoder's table; merge_after: interactions, but the last, with a merge of their own;
    operations: of the neck.
    """
    merges: list[Rule] = []
    if len(branches) > 1:
        merges += merge_rules(len(branches), f"merges.{len(merge_after)}.")
        for i, interaction in enumerate(merge_after):
            merges += merge_rules(len(branches), f"merges.{i}.", interaction)
    return [*encoder_rules(branches, num_interactions), *merges, *pyramid_rules(operations)]


def classifier_rules(
    branches: Sequence[Sequence[Rule]], num_interactions: int, *, merged: bool
) -> list[Rule]:
    """A classifier -> PyramidClassifier, with a head for every branch or one behind a merge."""
    head: list[Rule]
    if merged:
        head = [
            *linear_merge_rules(len(branches), "head.merge."),
            Rename(r"cls_norm\.(weight|bias)", r"head.norm.\1"),
            Rename(r"cls_head\.(weight|bias)", r"head.classifier.\1"),
        ]
    else:

        def part(match: re.Match[str]) -> str:
            return f"head.{_HEADS[match['part']]}.{int(match['k'] or 1) - 1}.{match['kind']}"

        source = r"(?:branch(?P<k>\d+)\.)?"  # none where one network is alone
        head = [Rename(rf"{source}(?P<part>norm|head)\.(?P<kind>weight|bias)", part)]
    return [*head, *encoder_rules(branches, num_interactions)]  # before the encoders, which drop final norms


_HEADS = {"norm": "norms", "head": "classifiers"}


def vision_rules(
    branches: Sequence[Sequence[Rule]], num_interactions: int, *, norm: str = "groupnorm"
) -> list[Rule]:
    """Tower and projector of PIIP-LLaVA, without their prefix in the released model -> PiipVision."""
    tower = with_prefix(encoder_rules(branches, num_interactions), r"vision_tower\.", "")
    return [*tower, *with_prefix(token_merge_rules(norm), r"mm_projector\.", "projector.")]


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
