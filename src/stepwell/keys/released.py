"""Whole released checkpoints: the prefixes that wrap a pyramid's names, and what lies around it.

PIIP (arXiv 2501.07783): detection and segmentation under `backbone.`, classification without a prefix,
PIIP-LLaVA under `model.vision_tower.vision_tower.` and `model.mm_projector.`, beside a Llama.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepwell.keys.engine import Drop, Rename, Rule, with_prefix
from stepwell.keys.piip import encoder_rules, token_merge_rules

__all__ = ["assistant_rules", "detector_rules", "is_language_model"]

_HEADS: list[Rule] = [
    Drop(r"(?:neck|rpn_head|roi_head|bbox_head|query_head)\..*", "detection head, not taken over"),
    Drop(r"(?:decode_head|auxiliary_head)\..*", "segmentation head, not taken over"),
]

_LANGUAGE_MODEL: list[Rule] = [
    Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the position"),
    Rename(r"model\.((?:embed_tokens|layers|norm)\..*)", r"model.language_model.\1"),
    Rename(r"lm_head\.weight", "lm_head.weight"),
]


def detector_rules(features: Sequence[Rule], target: str = "") -> list[Rule]:
    """A detector's or segmenter's checkpoint; `features` is the table of its backbone (keys/piip.py)."""
    return [*with_prefix(features, r"backbone\.", target), *_HEADS]


def assistant_rules(
    branches: Sequence[Sequence[Rule]], num_interactions: int, *, norm: str = "groupnorm"
) -> list[Rule]:
    """PIIP-LLaVA -> StepwellForConditionalGeneration; `branches` holds the table of every encoder."""
    tower = encoder_rules(branches, num_interactions)
    return [
        *with_prefix(tower, r"model\.vision_tower\.vision_tower\.", "model.vision."),
        *with_prefix(token_merge_rules(norm), r"model\.mm_projector\.", "model.vision.projector."),
        *_LANGUAGE_MODEL,
    ]


def is_language_model(name: str) -> bool:
    """Whether a tensor of StepwellForConditionalGeneration belongs to its language model."""
    return name.startswith(("model.language_model.", "lm_head."))
