"""The names of MMSegmentation's UperNet and auxiliary head, as PIIP (arXiv 2501.07783) has them, -> ours."""

from __future__ import annotations

from stepwell.keys.engine import Prefix, Rename, Rule

__all__ = ["UPERNET"]

_STATE = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK: list[Rule] = [
    Rename(r"conv\.weight", r"conv.weight"),
    Rename(rf"bn\.{_STATE}", r"norm.\1"),
]
_CLASSIFIER = Rename(r"conv_seg\.(weight|bias)", r"classifier.\1")


def _blocks(theirs: str, ours: str) -> Rename:
    """Numbered blocks; the group of `theirs` is the number."""
    return Rename(
        rf"{theirs}\.(?:conv\.(weight)|bn\.{_STATE})",
        lambda m: f"{ours}.{m[1]}." + (f"conv.{m[2]}" if m[2] else f"norm.{m[3]}"),
    )


UPERNET: list[Rule] = [
    Prefix(
        r"decode_head\.",
        "",
        [
            _blocks(r"psp_modules\.(\d+)\.1", "pools"),
            _blocks(r"lateral_convs\.(\d+)", "laterals"),
            _blocks(r"fpn_convs\.(\d+)", "smooth"),
            Prefix(r"bottleneck\.", "context.", _BLOCK),
            Prefix(r"fpn_bottleneck\.", "join.", _BLOCK),
            _CLASSIFIER,
        ],
    ),
    Prefix(r"auxiliary_head\.", "auxiliary.", [Prefix(r"convs\.0\.", "conv.", _BLOCK), _CLASSIFIER]),
]
"""Both heads -> UperNet, for any number of maps."""
