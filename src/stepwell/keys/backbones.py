"""Names of vision backbones in other code bases -> ours.

PIIP's released code has seven block classes (arXiv 2501.07783); timm, transformers and the networks' own
authors name the same networks differently. Ours: patch_embed.proj, class_token, registers, position.{table,
temporal}, embed_norm, blocks.<i>.{norm1, attn.{qkv,proj,q_norm,k_norm,relative_table}, scale1.gamma, norm2,
mlp.{fc1,fc2}, scale2.gamma}, norm; those of ConvNeXt are in keys/convnext.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from stepwell.keys.convnext import convnext_rules
from stepwell.keys.engine import Drop, Join, Rename, Rule
from stepwell.structures import Size

__all__ = ["Naming", "backbone_rules", "recognise"]

Naming = Literal[
    "deit",
    "internvit",
    "beit",
    "uniperceiver",
    "clip",
    "convnext_hf",
    "convnext_timm",
    "convnext_official",
    "timm_vit",
    "timm_beit",
    "transformers_vit",
    "transformers_beit",
    "internvit_hf",
    "augreg_npz",
    "resnet_hf",
]
"""Who names. The first seven are PIIP's block classes. "clip" is transformers' CLIP and SigLIP, "convnext_hf"
its ConvNeXt, "resnet_hf" its ResNet,
"transformers_vit" its ViT, DeiT, ViTMAE and Dinov2. "timm_vit" is timm's and what the authors
of DeiT, DeiT III, MAE, DINOv2 and InternViT released; "timm_beit" is timm's and the authors' BEiT v2.
"internvit_hf" are the folders of InternViT on the hub, "augreg_npz" is AugReg's JAX files (arXiv 2106.10270).
"""

_TELLTALES: tuple[tuple[Naming, str], ...] = (
    ("augreg_npz", r"embedding/kernel"),
    ("uniperceiver", r"visual_embed\.patch_embed\.proj\.weight"),
    ("convnext_official", r"downsample_layers\.0\.0\.weight"),
    ("convnext_timm", r"(?:\w+\.)?stages\.0\.blocks\.0\.conv_dw\.weight"),
    ("convnext_hf", r"(?:\w+\.)?encoder\.stages\.0\.layers\.0\.dwconv\.weight"),
    ("resnet_hf", r"(?:resnet\.)?embedder\.embedder\.convolution\.weight"),
    ("internvit_hf", r"(?:\w+\.)?encoder\.layers\.0\.attn\.qkv\.weight"),
    ("clip", r"(?:\w+\.)*encoder\.layers\.0\.self_attn\.q_proj\.weight"),
    ("transformers_beit", r"(?:\w+\.)?encoder\.layer\.0\.lambda_1"),
    ("transformers_vit", r"(?:\w+\.)?embeddings\.patch_embeddings\.projection\.weight"),
    ("timm_beit", r"blocks\.0\.attn\.q_bias"),
    ("timm_vit", r"blocks\.0\.attn\.qkv\.weight"),
)


def recognise(names: Iterable[str]) -> Naming | None:
    """Whose names these are, by one that every network of the naming has and no other; None for nobody's."""
    names = list(names)
    return next(
        (naming for naming, telltale in _TELLTALES if any(re.fullmatch(telltale, name) for name in names)),
        None,
    )


def backbone_rules(
    naming: Naming,
    *,
    class_token: bool = False,
    class_slot: bool = False,
    registers: bool = False,
    final_norm: bool = False,
    grid: Size | None = None,
    depth: int = 0,
    depths: Sequence[int] = (),
) -> list[Rule]:
    """The key table of a naming, for an encoder of ours that has a class token, a slot for it in its position
    table, registers, a final norm.

    grid: of the source's position table, which may begin with rows for a class token and a distillation
    token; None is square. depth: blocks, among which a relative table that BEiT v2 shares is handed out.
    ConvNeXt needs `depths`, residual blocks per stage, to number its layers. Heads are dropped.
    """
    if naming in ("convnext_hf", "convnext_timm", "convnext_official"):
        return convnext_rules(naming, depths)
    if naming == "resnet_hf":
        return _RESNET_HF
    tables = {
        "deit": _PLAIN,
        "internvit": _PLAIN,
        "beit": [*_PLAIN, *_beit(depth)],
        "uniperceiver": _UNIPERCEIVER,
        "clip": _CLIP,
        "timm_vit": [*_PLAIN, *_TIMM_HEADS],
        "timm_beit": [*_PLAIN, *_beit(depth), *_TIMM_HEADS],
        "transformers_vit": _TRANSFORMERS_VIT,
        "transformers_beit": _TRANSFORMERS_BEIT,
        "internvit_hf": _INTERNVIT_HF,
        "augreg_npz": _AUGREG_NPZ,
    }
    if naming not in tables:
        raise ValueError(f"unknown naming {naming!r}; choose from {', '.join(get_args(Naming))}")
    in_front = [*_class_token(class_token), *_registers(registers), *_final_norm(final_norm)]
    return [*in_front, *tables[naming], _position_table(grid, class_slot)]


_RESNET_HF: list[Rule] = [
    Rename(r"(?:resnet\.)?((?:embedder|encoder)\..+)", r"\1"),
    Drop(r"classifier\..+", "classifier"),
]


def _position_table(grid: Size | None, class_slot: bool) -> Rename:
    """(1, [1 +] [1 +] N, C), or without its first axis -> ours ([1 +] N, C).

    Rows for a class token and a distillation token stand in front of the cells' where the source has them. A
    class slot that it lacks is 0, which adds nothing.
    """

    def fit(table: Tensor) -> Tensor:
        rows = table.flatten(0, -2)
        cells = math.isqrt(len(rows)) ** 2 if grid is None else grid[0] * grid[1]
        extra = len(rows) - cells
        if extra not in (0, 1, 2):
            return rows  # of another shape, and told so
        slot = rows[:class_slot] if extra else rows.new_zeros(int(class_slot), rows.shape[1])
        return torch.cat([slot, rows[extra:]])

    pattern = (
        rf"pos_embed|(?:{_HF})?embeddings\.position_embeddings?(?:\.weight)?|"
        rf"{_CLIP_PREFIX}embeddings\.position_embedding\.weight|"
        r"visual_embed\.patch_embed\.spatial_pos_embed\.weight|Transformer/posembed_input/pos_embedding"
    )
    return Rename(pattern, "position.table", fit)


def _class_token(exists: bool) -> list[Rule]:
    pattern = rf"(?:{_HF})?(?:embeddings\.)?cls_token|{_CLIP_PREFIX}embeddings\.class_embedding|cls"
    if exists:
        return [Rename(pattern, "class_token", lambda t: t.view(1, 1, -1))]
    return [Drop(pattern, "this encoder has no class token")]


def _registers(exist: bool) -> list[Rule]:
    pattern = rf"reg_token|dist_token|(?:{_HF})?(?:embeddings\.)?(?:register_tokens|distillation_token)"
    if exist:
        return [Rename(pattern, "registers")]
    return [Drop(pattern, "this encoder has no registers")]


def _final_norm(exists: bool) -> list[Rule]:
    pattern = rf"(?:{_CLIP_PREFIX}post_layernorm|(?:{_HF})?layernorm|norm)\.(weight|bias)"
    jax = r"Transformer/encoder_norm/(scale|bias)"
    if exists:
        return [Rename(pattern, r"norm.\1"), Rename(jax, lambda m: f"norm.{_of_jax(m[1])}")]
    return [Drop(rf"{pattern}|{jax}", "this encoder ends before the final norm")]


def _no_key_bias(parts: list[Tensor]) -> Tensor:
    """BEiT's query and value bias -> qkv bias. A key bias would shift all logits alike."""
    query, value = parts
    return torch.cat([query, torch.zeros_like(query), value])


_HF = r"(?:vit|deit|dinov2|dinov2_with_registers|beit)\."
_CLIP_PREFIX = r"(?:clip_model\.)?(?:vision_model\.)?"

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


def _beit(depth: int) -> list[Rule]:
    every_block = tuple(f"blocks.{i}.attn.relative_table" for i in range(depth))
    return [
        Join(
            (r"blocks\.(\d+)\.attn\.q_bias", r"blocks\.(\d+)\.attn\.v_bias"),
            r"blocks.\1.attn.qkv.bias",
            _no_key_bias,
        ),
        Rename(r"rel_pos_bias\.relative_position_bias_table", every_block),
        Rename(r"blocks\.(\d+)\.attn\.relative_position_bias_table", r"blocks.\1.attn.relative_table"),
        Drop(r"(?:blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index", "computed from the grid"),
        Drop(r"pos_embed", "BEiT's blocks know relative positions only"),
        Drop(r"cls_pt_layers\..*|lm_head\..*", "for masked pretraining"),
    ]


_UNIPERCEIVER: list[Rule] = [
    Rename(r"visual_embed\.patch_embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
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
    Drop(r"text_model\..*|(?:text|visual)_projection\..*|logit_(?:scale|bias)", "the text half"),
    Drop(rf"{_CLIP_PREFIX}head\..*", "SigLIP's pooling head"),
]

_TIMM_HEADS: list[Rule] = [
    Drop(r"(?:head|head_dist|fc_norm|pre_logits\.fc)\.(?:weight|bias)", "classifier"),
    Rename(r"norm_pre\.(weight|bias)", r"embed_norm.\1"),  # CLIP in timm
    Drop(r"mask_token|decoder_.*", "for masked pretraining"),
    Drop(r"attn_pool\..*", "pooling head"),
    Drop(r"clip_projector\..*", "InternViT's projector into the space of texts"),
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
    Drop(rf"(?:{_HF})?pooler\..*|\w*classifier\..*|decoder\..*|lm_head\..*", "head"),
]

_TRANSFORMERS_VIT: list[Rule] = [
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

_INTERN_LAYER = rf"{_CLIP_PREFIX}encoder\.layers\.(\d+)\."
_INTERNVIT_HF: list[Rule] = [
    Rename(rf"{_CLIP_PREFIX}embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    Rename(
        rf"{_INTERN_LAYER}(norm[12]|attn\.(?:qkv|proj|q_norm|k_norm)|mlp\.fc[12])\.(weight|bias)",
        r"blocks.\1.\2.\3",
    ),
    Rename(rf"{_INTERN_LAYER}ls([12])", r"blocks.\1.scale\2.gamma"),
]


def _of_jax(kind: str) -> str:
    return {"kernel": "weight", "scale": "weight"}.get(kind, kind)


def _heads_first(parts: list[Tensor]) -> Tensor:
    """JAX's (C, h, d) of query, key and value -> (3 C, C); biases (h, d) -> (3 C)."""
    return torch.cat([part.flatten(-2).T if part.ndim == 3 else part.flatten() for part in parts])


_JAX_LAYER = r"Transformer/encoderblock_(\d+)/"
_JAX_ATTENTION = rf"{_JAX_LAYER}MultiHeadDotProductAttention_1/"
_AUGREG_NPZ: list[Rule] = [
    Rename(r"embedding/kernel", "patch_embed.proj.weight", lambda t: t.permute(3, 2, 0, 1)),
    Rename(r"embedding/bias", "patch_embed.proj.bias"),
    *(
        Join(
            tuple(rf"{_JAX_ATTENTION}{part}/{kind}" for part in ("query", "key", "value")),
            rf"blocks.\1.attn.qkv.{_of_jax(kind)}",
            _heads_first,
        )
        for kind in ("kernel", "bias")
    ),
    Rename(rf"{_JAX_ATTENTION}out/kernel", r"blocks.\1.attn.proj.weight", lambda t: t.flatten(0, 1).T),
    Rename(rf"{_JAX_ATTENTION}out/bias", r"blocks.\1.attn.proj.bias"),
    Rename(
        rf"{_JAX_LAYER}LayerNorm_([02])/(scale|bias)",
        lambda m: f"blocks.{m[1]}.norm{1 + int(m[2]) // 2}.{_of_jax(m[3])}",
    ),
    Rename(
        rf"{_JAX_LAYER}MlpBlock_3/Dense_([01])/(kernel|bias)",
        lambda m: f"blocks.{m[1]}.mlp.fc{1 + int(m[2])}.{_of_jax(m[3])}",
        lambda t: t.T if t.ndim == 2 else t,
    ),
    Drop(r"(?:head|pre_logits)/(?:kernel|bias)", "classifier"),
]
