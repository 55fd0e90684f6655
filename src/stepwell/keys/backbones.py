"""Names of vision backbones in other code bases -> ours.

PIIP's released code has seven block classes (arXiv 2501.07783); timm and transformers name the same networks
differently. Ours: patch_embed.proj, class_token, position.{table,temporal}, embed_norm, blocks.<i>.{norm1,
attn.{qkv,proj,q_norm,k_norm,relative_table}, scale1.gamma, norm2, mlp.{fc1,fc2}, scale2.gamma}, norm; and for
ConvNeXt embed.{conv,norm}, layers.<i>.{norm,conv} where it samples down, layers.<i>.{dwconv,norm,
mlp.{fc1,fc2},scale.gamma} elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from stepwell.keys.engine import Drop, Join, Rename, Rule

__all__ = ["Naming", "backbone_rules"]

Naming = Literal[
    "deit",
    "internvit",
    "beit",
    "uniperceiver",
    "clip",
    "convnext_hf",
    "convnext_timm",
    "timm_vit",
    "timm_beit",
    "transformers_vit",
    "transformers_beit",
]
"""Who names. The first seven are PIIP's block classes; "clip" and "convnext_hf" are transformers' names too,
and "convnext_timm" is timm's; "transformers_vit" is ViT, ViTMAE and Dinov2.
"""


def backbone_rules(
    naming: Naming,
    *,
    class_token: bool = False,
    class_slot: bool = False,
    final_norm: bool = False,
    depths: Sequence[int] = (),
) -> list[Rule]:
    """The key table of a naming, for an encoder of ours that has a class token, a slot for it, a final norm.

    ConvNeXt needs `depths`, residual blocks per stage, to number its layers. Heads are dropped.
    """
    if naming in ("convnext_hf", "convnext_timm"):
        return _convnext_hf(depths) if naming == "convnext_hf" else _convnext_timm(depths)
    tables = {
        "deit": [*_PLAIN, _table(r"pos_embed")],
        "internvit": [*_PLAIN, _table(r"pos_embed", keep_slot=class_slot)],
        "beit": [*_PLAIN, *_BEIT],
        "uniperceiver": _UNIPERCEIVER,
        "clip": [
            *_CLIP,
            _table(rf"{_CLIP_PREFIX}embeddings\.position_embedding\.weight", keep_slot=class_slot),
        ],
        "timm_vit": [*_PLAIN, _table(r"pos_embed"), *_TIMM_HEADS],
        "timm_beit": [*_PLAIN, *_BEIT, *_TIMM_HEADS],
        "transformers_vit": _TRANSFORMERS_VIT,
        "transformers_beit": _TRANSFORMERS_BEIT,
    }
    if naming not in tables:
        raise ValueError(f"unknown naming {naming!r}; choose from {', '.join(get_args(Naming))}")
    return [*_class_token(class_token), *_final_norm(final_norm), *tables[naming]]


def _table(pattern: str, *, keep_slot: bool = True) -> Rename:
    """(1, N, C) or (N, C) -> ours (N, C); without the class token's row in front if it is not to be kept."""
    return Rename(pattern, "position.table", lambda t: t.flatten(0, -2)[0 if keep_slot else 1 :])


def _class_token(exists: bool) -> list[Rule]:
    pattern = rf"(?:{_HF})?(?:embeddings\.)?cls_token|{_CLIP_PREFIX}embeddings\.class_embedding"
    if exists:
        return [Rename(pattern, "class_token", lambda t: t.view(1, 1, -1))]
    return [Drop(pattern, "this encoder has no class token")]


def _final_norm(exists: bool) -> list[Rule]:
    pattern = rf"(?:{_CLIP_PREFIX}post_layernorm|(?:{_HF})?layernorm|norm)\.(weight|bias)"
    if exists:
        return [Rename(pattern, r"norm.\1")]
    return [Drop(pattern, "this encoder ends before the final norm")]


def _no_key_bias(parts: list[Tensor]) -> Tensor:
    """BEiT's query and value bias -> qkv bias. A key bias would shift all logits alike."""
    query, value = parts
    return torch.cat([query, torch.zeros_like(query), value])


_HF = r"(?:vit|dinov2|beit)\."
_CLIP_PREFIX = r"(?:clip_model\.)?(?:vision_model\.)?"
_NEXT_PREFIX = r"(?:convnext_model\.|convnext\.)?"

_PLAIN: list[Rule] = [
    Rename(r"patch_embed\.proj\.(?:weight|bias)", r"\g<0>"),
    Rename(
        r"blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj|q_norm|k_norm)|mlp\.fc[12])\.(?:weight|bias)", r"\g<0>"
    ),
    Rename(
        r"blocks\.(\d+)\.(?:gamma_([12])|ls([12])\.gamma)",
        lambda m: f"blocks.{m[1]}.scale{m[2] or m[3]}.gamma",
    ),
]

_BEIT: list[Rule] = [
    Join(
        (r"blocks\.(\d+)\.attn\.q_bias", r"blocks\.(\d+)\.attn\.v_bias"),
        r"blocks.\1.attn.qkv.bias",
        _no_key_bias,
    ),
    Rename(r"blocks\.(\d+)\.attn\.relative_position_bias_table", r"blocks.\1.attn.relative_table"),
    Drop(r"blocks\.\d+\.attn\.relative_position_index", "computed from the grid"),
    Drop(r"pos_embed", "BEiT's blocks know relative positions only"),
]

_UNIPERCEIVER: list[Rule] = [
    Rename(r"visual_embed\.patch_embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
    Rename(r"visual_embed\.patch_embed\.spatial_pos_embed\.weight", "position.table"),
    Rename(r"visual_embed\.patch_embed\.temporal_pos_embed\.weight", "position.temporal"),
    Rename(r"visual_embed\.embeddings_norm\.(weight|bias)", r"embed_norm.\1"),
    Rename(r"layers\.(\d+)\.self_attn\.in_proj[._](weight|bias)", r"blocks.\1.attn.qkv.\2"),
    Rename(r"layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    Rename(r"layers\.(\d+)\.linear([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
    Rename(r"layers\.(\d+)\.norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    Rename(r"layers\.(\d+)\.gamma_([12])", r"blocks.\1.scale\2.gamma"),
]

_CLIP_LAYER = rf"{_CLIP_PREFIX}encoder\.layers\.(\d+)\."
_CLIP: list[Rule] = [
    Rename(rf"{_CLIP_PREFIX}embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    Drop(rf"{_CLIP_PREFIX}embeddings\.position_ids", "counts from 0"),
    Rename(rf"{_CLIP_PREFIX}pre_layrnorm\.(weight|bias)", r"embed_norm.\1"),
    *(
        Join(
            tuple(rf"{_CLIP_LAYER}self_attn\.{part}_proj\.{kind}" for part in "qkv"),
            rf"blocks.\1.attn.qkv.{kind}",
            torch.cat,
        )
        for kind in ("weight", "bias")
    ),
    Rename(rf"{_CLIP_LAYER}self_attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    Rename(rf"{_CLIP_LAYER}layer_norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    Rename(rf"{_CLIP_LAYER}mlp\.(fc[12])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    Drop(r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale", "CLIP's other half"),
]

_TIMM_HEADS: list[Rule] = [
    Drop(r"(?:head|head_dist|fc_norm)\.(?:weight|bias)", "classifier"),
    Drop(r"dist_token", "distillation token"),
]

_HF_LAYER = rf"(?:{_HF})?encoder\.layer\.(\d+)\."
_HF_ATTENTION = rf"{_HF_LAYER}attention\.attention\."
_TRANSFORMERS_COMMON: list[Rule] = [
    Rename(rf"(?:{_HF})?embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    Drop(rf"(?:{_HF})?embeddings\.mask_token", "for masked pretraining"),
    Join(
        tuple(rf"{_HF_ATTENTION}{part}\.weight" for part in ("query", "key", "value")),
        r"blocks.\1.attn.qkv.weight",
        torch.cat,
    ),
    Rename(rf"{_HF_LAYER}attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    Rename(rf"{_HF_LAYER}layernorm_before\.(weight|bias)", r"blocks.\1.norm1.\2"),
    Rename(rf"{_HF_LAYER}layernorm_after\.(weight|bias)", r"blocks.\1.norm2.\2"),
    Rename(rf"{_HF_LAYER}intermediate\.dense\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    Rename(rf"{_HF_LAYER}output\.dense\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    Drop(rf"(?:{_HF})?pooler\..*|classifier\..*|decoder\..*|lm_head\..*", "head"),
]

_TRANSFORMERS_VIT: list[Rule] = [
    _table(rf"(?:{_HF})?embeddings\.position_embeddings"),
    Join(
        tuple(rf"{_HF_ATTENTION}{part}\.bias" for part in ("query", "key", "value")),
        r"blocks.\1.attn.qkv.bias",
        torch.cat,
    ),
    Rename(rf"{_HF_LAYER}(norm[12]|mlp\.fc[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
    Rename(rf"{_HF_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.scale\2.gamma"),
    *_TRANSFORMERS_COMMON,
]

_TRANSFORMERS_BEIT: list[Rule] = [
    Join(
        tuple(rf"{_HF_ATTENTION}{part}\.bias" for part in ("query", "value")),
        r"blocks.\1.attn.qkv.bias",
        _no_key_bias,
    ),
    Rename(
        rf"{_HF_ATTENTION}relative_position_bias\.relative_position_bias_table",
        r"blocks.\1.attn.relative_table",
    ),
    Drop(rf"{_HF_ATTENTION}relative_position_bias\.relative_position_index", "computed from the grid"),
    Rename(rf"{_HF_LAYER}lambda_([12])", r"blocks.\1.scale\2.gamma"),
    *_TRANSFORMERS_COMMON,
]


def _convnext_hf(depths: Sequence[int]) -> list[Rule]:
    stage = rf"{_NEXT_PREFIX}encoder\.stages\.(\d+)\."
    parts = {"dwconv": "dwconv", "layernorm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    return [
        Rename(rf"{_NEXT_PREFIX}embeddings\.patch_embeddings\.(weight|bias)", r"embed.conv.\1"),
        Rename(rf"{_NEXT_PREFIX}embeddings\.layernorm\.(weight|bias)", r"embed.norm.\1"),
        *_convnext_downsampling(rf"{stage}downsampling_layer", depths),
        *_convnext_blocks(rf"{stage}layers", parts, "layer_scale_parameter", depths),
        Drop(rf"{_NEXT_PREFIX}layernorm\.(weight|bias)", "the final norm is stored and never applied"),
        Drop(r"classifier\.(weight|bias)", "classifier"),
    ]


def _convnext_timm(depths: Sequence[int]) -> list[Rule]:
    stage = rf"{_NEXT_PREFIX}stages\.(\d+)\."
    parts = {"conv_dw": "dwconv", "norm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    return [
        Rename(rf"{_NEXT_PREFIX}stem\.0\.(weight|bias)", r"embed.conv.\1"),
        Rename(rf"{_NEXT_PREFIX}stem\.1\.(weight|bias)", r"embed.norm.\1"),
        *_convnext_downsampling(rf"{stage}downsample", depths),
        *_convnext_blocks(rf"{stage}blocks", parts, "(?:gamma|weight)", depths),  # PIIP-LLaVA says `weight`
        Drop(rf"{_NEXT_PREFIX}(?:head|norm_pre)\..*", "head"),
    ]


def _convnext_downsampling(prefix: str, depths: Sequence[int]) -> list[Rule]:
    """Groups of `prefix`: the stage. Entry 0 is the norm, entry 1 the convolution."""

    def number(stage: str) -> int:
        return sum(depths[: int(stage)]) + int(stage) - 1

    return [
        Rename(rf"{prefix}\.0\.(weight|bias)", lambda m: f"layers.{number(m[1])}.norm.{m[2]}"),
        Rename(rf"{prefix}\.1\.(weight|bias)", lambda m: f"layers.{number(m[1])}.conv.{m[2]}"),
    ]


def _convnext_blocks(prefix: str, parts: dict[str, str], scale: str, depths: Sequence[int]) -> list[Rule]:
    """Groups of `prefix`: the stage; then comes the block. Stages but the first start with a downsampling."""

    def number(stage: str, block: str) -> int:
        return sum(depths[: int(stage)]) + int(stage) + int(block)

    def part(match: re.Match[str]) -> str:
        return f"layers.{number(match[1], match[2])}.{parts[match[3]]}.{match[4]}"

    return [
        Rename(rf"{prefix}\.(\d+)\.{scale}", lambda m: f"layers.{number(m[1], m[2])}.scale.gamma"),
        Rename(rf"{prefix}\.(\d+)\.({'|'.join(map(re.escape, parts))})\.(weight|bias)", part),
    ]
