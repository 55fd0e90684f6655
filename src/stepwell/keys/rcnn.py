"""The names of MMDetection's two-stage detectors, as in PIIP's released checkpoints (arXiv 2501.07783).

Tables end at our `heads/rcnn.py` and `heads/cascade.py`.
"""

from __future__ import annotations

from stepwell.keys.engine import Prefix, Rename, Rule

__all__ = ["BOX_HEAD", "MASK_HEAD", "NECK", "RPN", "cascade_rules", "rcnn_rules", "stage_rules"]

NECK: list[Rule] = [
    Rename(r"lateral_convs\.(\d+)\.conv\.(weight|bias)", r"lateral.\1.\2"),
    Rename(r"fpn_convs\.(\d+)\.conv\.(weight|bias)", r"output.\1.\2"),
]
RPN: list[Rule] = [
    Rename(rf"{theirs}\.(weight|bias)", rf"{ours}.\1")
    for theirs, ours in (("rpn_conv", "conv"), ("rpn_cls", "objectness"), ("rpn_reg", "deltas"))
]
BOX_HEAD: list[Rule] = [
    Rename(r"shared_convs\.(\d+)\.conv\.(weight|bias)", r"convs.\1.conv.\2"),
    Rename(r"shared_convs\.(\d+)\.bn\.(\w+)", r"convs.\1.norm.\2"),
    Rename(r"shared_fcs\.(\d+)\.(weight|bias)", r"linears.\1.\2"),
    Rename(r"fc_cls\.(weight|bias)", r"classes.\1"),
    Rename(r"fc_reg\.(weight|bias)", r"deltas.\1"),
]
MASK_HEAD: list[Rule] = [
    Rename(r"convs\.(\d+)\.conv\.(weight|bias)", r"convs.\1.\2"),
    Rename(r"upsample\.(weight|bias)", r"upsample.\1"),
    Rename(r"conv_logits\.(weight|bias)", r"logits.\1"),
]
_FIRST_STAGE: list[Rule] = [Prefix(r"neck\.", "neck.", NECK), Prefix(r"rpn_head\.", "rpn.", RPN)]


def rcnn_rules() -> list[Rule]:
    """`neck.`, `rpn_head.` and `roi_head.` -> Rcnn, with masks or without."""
    return [
        *_FIRST_STAGE,
        Prefix(r"roi_head\.bbox_head\.", "box.", BOX_HEAD),
        Prefix(r"roi_head\.mask_head\.", "mask.", MASK_HEAD),
    ]


def cascade_rules(num_stages: int) -> list[Rule]:
    """`neck.`, `rpn_head.` and `roi_head.` -> Cascade, with masks or without."""
    return [*_FIRST_STAGE, Prefix(r"roi_head\.", "", stage_rules(num_stages))]


def stage_rules(num_stages: int) -> list[Rule]:
    """`bbox_head.{k}.` and `mask_head.{k}.` -> heads of a Cascade's stages."""
    rules: list[Rule] = []
    for k in range(num_stages):
        rules.append(Prefix(rf"bbox_head\.{k}\.", f"boxes.{k}.", BOX_HEAD))
        rules.append(Prefix(rf"mask_head\.{k}\.", f"masks.{k}.", MASK_HEAD))
    return rules
