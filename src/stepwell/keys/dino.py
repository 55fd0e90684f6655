"""The names of DINO in the official PIIP code (arXiv 2501.07783), whose heads are mmdetection's.

Theirs keep neck and head apart, and number the parts of a layer; ours name them.
"""

from __future__ import annotations

from stepwell.keys.engine import Prefix, Rename, Rule
from stepwell.keys.piip import ATTENTION

__all__ = ["LABEL_EMBEDDING", "NECK", "dino_rules"]

NECK: list[Rule] = [
    Rename(rf"{theirs}\.(\d+)\.{part}\.(weight|bias)", rf"{ours}.\1.{i}.\2")
    for theirs, ours in (("convs", "projections"), ("extra_convs", "extras"))
    for i, part in enumerate(("conv", "gn"))
]
"""`ChannelMapper`."""

LABEL_EMBEDDING: list[Rule] = [Rename(r"label_embedding\.weight", r"\g<0>")]


def _layer(attentions: list[Rule], *norms: str) -> list[Rule]:
    return [
        *attentions,
        *(Rename(rf"norms\.{i}\.(weight|bias)", rf"{norm}.\1") for i, norm in enumerate(norms)),
        Rename(r"ffns\.0\.layers\.0\.0\.(weight|bias)", r"ffn.fc1.\1"),
        Rename(r"ffns\.0\.layers\.1\.(weight|bias)", r"ffn.fc2.\1"),
    ]


_ENCODER_LAYER = _layer([Prefix(r"attentions\.0\.", "attn.", ATTENTION)], "attn_norm", "ffn_norm")
_DECODER_LAYER = _layer(
    [
        Rename(r"attentions\.0\.attn\.in_proj_(weight|bias)", r"self_attn.qkv.\1"),
        Rename(r"attentions\.0\.attn\.out_proj\.(weight|bias)", r"self_attn.proj.\1"),
        Prefix(r"attentions\.1\.", "cross_attn.", ATTENTION),
    ],
    *("self_norm", "cross_norm", "ffn_norm"),
)


def dino_rules(encoder_layers: int = 6, decoder_layers: int = 6) -> list[Rule]:
    """Neck and head, `neck.` and `bbox_head.` -> `Dino`."""
    transformer: list[Rule] = [
        Rename("level_embeds", "level_embedding"),
        Rename(r"query_embed\.weight", "queries"),
        Rename(r"enc_output\.(weight|bias)", r"memory_proj.\1"),
        Rename(r"enc_output_norm\.(weight|bias)", r"memory_norm.\1"),
        Rename(r"decoder\.ref_point_head\.([02])\.(weight|bias)", r"decoder.query_code.\1.\2"),
        Rename(r"decoder\.norm\.(weight|bias)", r"\g<0>"),
        *(
            Prefix(rf"{part}\.layers\.{i}\.", f"{part}.layers.{i}.", rules)
            for part, count, rules in (
                ("encoder", encoder_layers, _ENCODER_LAYER),
                ("decoder", decoder_layers, _DECODER_LAYER),
            )
            for i in range(count)
        ),
    ]
    head: list[Rule] = [
        Rename(r"cls_branches\.(\d+)\.(weight|bias)", r"class_heads.\1.\2"),
        Rename(r"reg_branches\.(\d+)\.([024])\.(weight|bias)", r"box_heads.\1.\2.\3"),
        *LABEL_EMBEDDING,
        Prefix(r"transformer\.", "", transformer),
    ]
    return [Prefix(r"neck\.", "neck.", NECK), Prefix(r"bbox_head\.", "", head)]
