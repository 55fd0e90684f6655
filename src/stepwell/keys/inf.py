"""The names of INF-LLaVA's official code (arXiv 2407.16198) -> ours.

Theirs call local crops "crop" and global ones "stride".
"""

from __future__ import annotations

from collections.abc import Sequence

from stepwell.keys.engine import Prefix, Rename, Rule

__all__ = ["CROSS_ATTENTION", "ENHANCEMENT", "vision_rules"]

CROSS_ATTENTION: list[Rule] = [
    Rename(r"linears\.0\.(weight|bias)", r"query.\1"),
    Rename(r"linears\.1\.(weight|bias)", r"key.\1"),
    Rename(r"linears\.2\.(weight|bias)", r"value.\1"),
    Rename(r"linears\.3\.(weight|bias)", r"out.\1"),
    Rename(r"ln\.(weight|bias)", r"norm.\1"),
]
ENHANCEMENT: list[Rule] = [
    Prefix(r"attention\.", "attentions.0.", CROSS_ATTENTION),
    Rename(r"ffn_crop\.([02]\.(?:weight|bias))", r"fusion.of_local.\1"),
    Rename(r"ffn_stride\.([02]\.(?:weight|bias))", r"fusion.of_global.\1"),
    Rename(r"ln_fuse\.(weight|bias)", r"fusion.norm.\1"),
]


def vision_rules(tower: Sequence[Rule]) -> list[Rule]:
    """A whole model's vision -> InfVision. tower: the encoder's table."""
    return [
        Prefix(r"(?:model\.)?vision_tower\.vision_tower\.", "branches.0.", tower),
        Prefix(r"(?:model\.)?spatial_embed\.", "enhancement.", ENHANCEMENT),
        Rename(r"(?:model\.)?mm_projector\.([02]\.(?:weight|bias))", r"projector.\1"),
    ]
