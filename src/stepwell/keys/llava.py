"""LLaVA's names -> ours, for every system that is built on its code: the language model.

It keeps the names that it has in transformers, beside the vision tower.
"""

from __future__ import annotations

from stepwell.keys.engine import Drop, Rename, Rule

__all__ = ["LANGUAGE_MODEL"]

LANGUAGE_MODEL: list[Rule] = [
    Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the position"),
    Rename(r"model\.((?:embed_tokens|layers|norm)\..*)", r"model.language_model.\1"),
    Rename(r"lm_head\.weight", r"\g<0>"),
]
"""A whole checkpoint's -> StepwellForConditionalGeneration's."""
