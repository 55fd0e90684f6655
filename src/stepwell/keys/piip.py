"""The names of the official PIIP code (arXiv 2501.07783): detection, segmentation, classification and LLaVA.

Theirs count branches from 1, write one module per pair of branches, and call a unit's larger network
"branch 1" whatever the pair; ours are lists. Tables are made for any number of branches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from stepwell.keys.backbones import Naming
from stepwell.keys.engine import Drop, Join, Prefix, Rename, Rule

__all__ = [
    "ATTENTION",
    "BLOCKS",
    "INJECTOR",
    "UNIT",
    "classifier_rules",
    "detector_rules",
    "encoder_rules",
    "features_rules",
    "interaction_rules",
    "linear_merge_rules",
    "merge_rules",
    "pyramid_rules",
    "token_merge_rules",
    "vision_rules",
]

BLOCKS: dict[str, Naming] = {
    "vit": "deit",
    "deit": "deit",
    "deit3": "deit",
    "augreg": "internvit",
    "mae": "internvit",
    "dinov2": "internvit",
    "internvit": "internvit",
    "beitv2": "beit",
    "uniperceiver": "uniperceiver",
    "clip": "clip",
    "convnext": "convnext_hf",
    "convnext_clip": "convnext_timm",
}
"""The block class, hence names, that the released code has for a family of networks."""

ATTENTION: list[Rule] = [
    Rename(rf"{theirs}\.(weight|bias)", rf"{ours}.\1")
    for theirs, ours in (
        ("value_proj", "value"),
        ("sampling_offsets", "offsets"),
        ("attention_weights", "weights"),
        ("output_proj", "out"),
        ("wq", "query"),
        ("wk", "key"),
        ("wv", "value"),
        ("proj", "out"),
    )
]
"""Deformable and regular cross-attention; they share no name."""

INJECTOR: list[Rule] = [
    Prefix(r"attn\.", "attn.", ATTENTION),
    Rename(r"feat_norm\.(weight|bias)", r"feature_norm.\1"),
    Rename(r"((?:query|ffn)_norm|ffn\.fc[12])\.(weight|bias)", r"\1.\2"),
    Rename(r"ffn\.dwconv\.dwconv\.(weight|bias)", r"ffn.conv.\1"),
    Rename(r"ca_(?:gamma|weight)", "gate"),  # "weight" in PIIP-LLaVA, where "gamma" would be rewritten
    Rename(r"cffn_(?:gamma|weight)", "ffn_gate"),
]

_MESSAGE: list[Rule] = [
    Rename(r"proj\.(weight|bias)", r"project.\1"),
    Prefix(r"injector\.", "injector.", INJECTOR),
]
UNIT: list[Rule] = [
    Prefix(r"branch2to1_", "messages.0.", _MESSAGE),
    Prefix(r"branch1to2_", "messages.1.", _MESSAGE),
]


def interaction_rules(num_branches: int) -> list[Rule]:
    """One interaction between neighbours, finest pair first."""
    pairs = [(a, a + 1) for a in reversed(range(1, num_branches))]
    return [Prefix(rf"interaction_units_{a}{b}\.", f"units.{i}.", UNIT) for i, (a, b) in enumerate(pairs)]


def encoder_rules(branches: Sequence[Sequence[Rule]], num_interactions: int) -> list[Rule]:
    """`branch{k}.` and `interactions.{i}.` -> PyramidEncoder, as `encoder`. branches: their tables."""
    interaction = interaction_rules(len(branches))
    return [
        *_of_branches([Prefix("", f"encoder.branches.{k}.", table) for k, table in enumerate(branches)]),
        *(
            Prefix(rf"interactions\.{i}\.", f"encoder.interactions.{i}.", interaction)
            for i in range(num_interactions)
        ),
    ]


def _of_branches(tables: Sequence[Rule]) -> list[Rule]:
    """A rule for the tensors of every branch; a network that is alone has its names without a prefix."""
    return [
        Prefix(rf"branch{k}\." if len(tables) > 1 else "", "", [table])
        for k, table in enumerate(tables, start=1)
    ]


def merge_rules(num_branches: int, target: str, interaction: int | None = None) -> list[Rule]:
    """The last merge of a dense model, or the one after an interaction that is not the last."""
    layers = [Rename(r"\d+\.(?:weight|bias)", r"\g<0>")]
    if interaction is None:
        return _merge("merge_branch", "w", num_branches, target, layers)
    prefix = f"intermediate_merging_{interaction}_"
    return _merge(f"{prefix}branch", f"{prefix}w", num_branches, target, layers)


def linear_merge_rules(num_branches: int, target: str) -> list[Rule]:
    """The merge of a classifier: a norm alone in branch 1; elsewhere our three layers have other numbers."""
    layers = [Rename(rf"{2 * i}\.(weight|bias)", rf"{i}.\1") for i in range(3)]
    norm = Rename(r"weight|bias", r"\g<0>")
    return _merge("merge_branch", "w", num_branches, target, [*layers, norm])


def _merge(stack: str, weight: str, num_branches: int, target: str, layers: Sequence[Rule]) -> list[Rule]:
    """stack, weight: their names for the layers and the scalar of a branch, before its number."""
    scalars = tuple(f"{weight}{k + 1}" for k in range(num_branches))
    stacks = [Prefix(rf"{stack}{k + 1}\.", f"{target}stacks.{k}.", layers) for k in range(num_branches)]
    return [*stacks, Join(scalars, f"{target}weights", torch.stack)]


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


def detector_rules(features: Sequence[Rule], head: Sequence[Rule]) -> list[Rule]:
    """The checkpoint of a detector or segmenter -> its model; features, head: the tables of these parts."""
    return [Prefix(r"backbone\.", "backbone.pyramid.", features), Prefix("", "head.", head)]


def classifier_rules(
    branches: Sequence[Sequence[Rule]], num_interactions: int, *, merged: bool
) -> list[Rule]:
    """A classifier -> PyramidClassifier, with a head for every branch or one behind a merge."""
    if merged:
        head: list[Rule] = [
            *linear_merge_rules(len(branches), "head.merge."),
            Rename(r"cls_norm\.(weight|bias)", r"head.norm.\1"),
            Rename(r"cls_head\.(weight|bias)", r"head.classifier.\1"),
        ]
    else:
        norms = [Rename(r"norm\.(weight|bias)", rf"head.norms.{k}.\1") for k in range(len(branches))]
        heads = [Rename(r"head\.(weight|bias)", rf"head.classifiers.{k}.\1") for k in range(len(branches))]
        head = [*_of_branches(norms), *_of_branches(heads)]
    return [*head, *encoder_rules(branches, num_interactions)]  # before the encoders, which drop final norms


def vision_rules(
    branches: Sequence[Sequence[Rule]], num_interactions: int, *, norm: str = "groupnorm"
) -> list[Rule]:
    """Tower and projector of PIIP-LLaVA, with or without their prefix in the whole model -> PiipVision."""
    return [
        Prefix(r"(?:model\.vision_tower\.)?vision_tower\.", "", encoder_rules(branches, num_interactions)),
        Prefix(r"(?:model\.)?mm_projector\.", "projector.", token_merge_rules(norm)),
    ]


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
