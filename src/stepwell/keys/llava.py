"""LLaVA's names -> ours: its own code's, and those of transformers, whose folders llava-hf released.

Its own code names the language model as transformers alone would, beside the vision tower; systems that are
built on it share that. transformers' files are of its version 4, with a level `vision_model` in the tower and
the language model whole; version 5 has others in memory, and folders of either are taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepwell.keys.engine import Drop, Prefix, Rename, Rule

__all__ = ["LANGUAGE_MODEL", "NEWLINE", "TRANSFORMERS_LANGUAGE_MODEL", "vision_rules"]

LANGUAGE_MODEL: list[Rule] = [
    Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the position"),
    Rename(r"model\.((?:embed_tokens|layers|norm)\..*)", r"model.language_model.\1"),
    Rename(r"lm_head\.weight", r"\g<0>"),
]
"""A whole checkpoint's -> StepwellForConditionalGeneration's."""

_LANGUAGE = r"(?:language_model\.model|model\.language_model)\."
TRANSFORMERS_LANGUAGE_MODEL: list[Rule] = [
    Drop(rf"{_LANGUAGE}layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the position"),
    Rename(rf"{_LANGUAGE}((?:embed_tokens|layers|norm)\..*)", r"model.language_model.\1"),
    Rename(r"language_model\.lm_head\.weight", "lm_head.weight"),
]
"""The same of transformers' classes, where that differs."""

NEWLINE = Rename(r"image_newline", "newline")
"""-> TileMerge."""


def vision_rules(tower: Sequence[Rule]) -> list[Rule]:
    """Tower, projector and newline of a whole model -> PlainVision and AnyResVision. tower: the encoder's."""
    return [
        Prefix(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?", "branches.0.", tower),
        Prefix(r"(?:model\.)?mm_projector\.", "projector.", [Rename(r"(?:\d+\.)?(?:weight|bias)", r"\g<0>")]),
        Prefix(r"(?:model\.)?multi_modal_projector\.", "projector.", [Rename(_LINEAR, _place)]),
        Prefix(r"(?:model\.)?", "merge.", [NEWLINE]),
    ]


_LINEAR = r"linear_(\d+)\.(weight|bias)"


def _place(match: re.Match[str]) -> str:
    """Theirs count the linears from 1, ours the layers between them too."""
    return f"{2 * (int(match[1]) - 1)}.{match[2]}"
