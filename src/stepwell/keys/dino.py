"""The names of MMDetection's DINO head and neck, as in PIIP's released checkpoints (arXiv 2501.07783).

Tables end at our `heads/dino.py`.
"""

from __future__ import annotations

from stepwell.keys.engine import Prefix, Rename, Rule

__all__ = ["DINO", "NECK"]

NECK: list[Rule] = [
    Rename(rf"{theirs}\.(\d+)\.{layer}\.(weight|bias)", rf"{ours}.\1.{place}.\2")
    for theirs, ours in (("convs", "maps"), ("extra_convs", "extras"))
    for layer, place in (("conv", 0), ("gn", 1))
]
_DEFORMABLE: list[Rule] = [
    Rename(rf"{theirs}\.(weight|bias)", rf"{ours}.\1")
    for theirs, ours in (
        ("value_proj", "value"),
        ("sampling_offsets", "offsets"),
        ("attention_weights", "weights"),
        ("output_proj", "out"),
    )
]
_LAYER: list[Rule] = [
    Rename(r"norms\.(\d+)\.(weight|bias)", r"norms.\1.\2"),
    Rename(r"ffns\.0\.layers\.0\.0\.(weight|bias)", r"ffn.fc1.\1"),
    Rename(r"ffns\.0\.layers\.1\.(weight|bias)", r"ffn.fc2.\1"),
]
_ENCODER_LAYER: list[Rule] = [Prefix(r"attentions\.0\.", "attention.", _DEFORMABLE), *_LAYER]
_DECODER_LAYER: list[Rule] = [
    Rename(r"attentions\.0\.attn\.(in_proj_weight|in_proj_bias)", r"self_attention.\1"),
    Rename(r"attentions\.0\.attn\.out_proj\.(weight|bias)", r"self_attention.out_proj.\1"),
    Prefix(r"attentions\.1\.", "cross_attention.", _DEFORMABLE),
    *_LAYER,
]


def _layers(theirs: str, ours: str, rules: list[Rule], most: int = 32) -> list[Rule]:
    return [Prefix(rf"{theirs}\.layers\.{i}\.", f"{ours}.{i}.", rules) for i in range(most)]


_TRANSFORMER: list[Rule] = [
    Rename(r"level_embeds", "levels"),
    Rename(r"enc_output\.(weight|bias)", r"memory.0.\1"),
    Rename(r"enc_output_norm\.(weight|bias)", r"memory.1.\1"),
    Rename(r"query_embed\.weight", "contents.weight"),
    Rename(r"decoder\.ref_point_head\.(0|2)\.(weight|bias)", r"places.\1.\2"),
    Rename(r"decoder\.norm\.(weight|bias)", r"norm.\1"),
    *_layers("encoder", "encoder", _ENCODER_LAYER),
    *_layers("decoder", "decoder", _DECODER_LAYER),
]
DINO: list[Rule] = [
    Prefix(r"neck\.", "neck.", NECK),
    Prefix(r"(?:bbox_head|query_head)\.transformer\.", "", _TRANSFORMER),
    Rename(r"(?:bbox_head|query_head)\.cls_branches\.(\d+)\.(weight|bias)", r"classifiers.\1.\2"),
    Rename(r"(?:bbox_head|query_head)\.reg_branches\.(\d+)\.(0|2|4)\.(weight|bias)", r"regressors.\1.\2.\3"),
    Rename(r"(?:bbox_head|query_head)\.label_embedding\.weight", "noisy_labels.weight"),
]
"""`neck.` and `bbox_head.` -> Dino."""
