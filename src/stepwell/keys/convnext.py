"""Names of ConvNeXt in other code bases -> ours.

Ours: embed.{conv,norm}, layers.<i>.{norm,conv} where it samples down, layers.<i>.{dwconv,norm,mlp.{fc1,fc2},
scale.gamma} elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from stepwell.keys.engine import Drop, Rename, Rule

__all__ = ["convnext_rules"]


def convnext_rules(
    naming: Literal["convnext_hf", "convnext_timm", "convnext_official"], depths: Sequence[int]
) -> list[Rule]:
    """The key table of transformers, timm, or the authors (arXiv 2201.03545).

    depths: residual blocks per stage.
    """
    return {"convnext_hf": _transformers, "convnext_timm": _timm, "convnext_official": _official}[naming](
        depths
    )


_PREFIX = r"(?:convnext_model\.|convnext\.)?"


def _transformers(depths: Sequence[int]) -> list[Rule]:
    stage = rf"{_PREFIX}encoder\.stages\.(\d+)\."
    parts = {"dwconv": "dwconv", "layernorm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    return [
        Rename(rf"{_PREFIX}embeddings\.patch_embeddings\.(weight|bias)", r"embed.conv.\1"),
        Rename(rf"{_PREFIX}embeddings\.layernorm\.(weight|bias)", r"embed.norm.\1"),
        *_downsampling(rf"{stage}downsampling_layer", depths),
        *_blocks(rf"{stage}layers", parts, "layer_scale_parameter", depths),
        Drop(rf"{_PREFIX}layernorm\.(weight|bias)", "the final norm is stored and never applied"),
        Drop(r"classifier\.(weight|bias)", "classifier"),
    ]


def _timm(depths: Sequence[int]) -> list[Rule]:
    stage = rf"{_PREFIX}stages\.(\d+)\."
    parts = {"conv_dw": "dwconv", "norm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    return [
        Rename(rf"{_PREFIX}stem\.0\.(weight|bias)", r"embed.conv.\1"),
        Rename(rf"{_PREFIX}stem\.1\.(weight|bias)", r"embed.norm.\1"),
        *_downsampling(rf"{stage}downsample", depths),
        *_blocks(rf"{stage}blocks", parts, "(?:gamma|weight)", depths),  # PIIP-LLaVA says `weight`
        Drop(rf"{_PREFIX}(?:head|norm_pre)\..*", "head"),
    ]


def _official(depths: Sequence[int]) -> list[Rule]:
    parts = {"dwconv": "dwconv", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    return [
        Rename(r"downsample_layers\.0\.0\.(weight|bias)", r"embed.conv.\1"),
        Rename(r"downsample_layers\.0\.1\.(weight|bias)", r"embed.norm.\1"),
        *_downsampling(r"downsample_layers\.(\d+)", depths),
        *_blocks(r"stages\.(\d+)", parts, "gamma", depths),
        Drop(r"(?:norm|head)\.(?:weight|bias)", "head"),
    ]


def _downsampling(prefix: str, depths: Sequence[int]) -> list[Rule]:
    """Groups of `prefix`: the stage. Entry 0 is the norm, entry 1 the convolution."""

    def number(stage: str) -> int:
        return sum(depths[: int(stage)]) + int(stage) - 1

    return [
        Rename(rf"{prefix}\.0\.(weight|bias)", lambda m: f"layers.{number(m[1])}.norm.{m[2]}"),
        Rename(rf"{prefix}\.1\.(weight|bias)", lambda m: f"layers.{number(m[1])}.conv.{m[2]}"),
    ]


def _blocks(prefix: str, parts: dict[str, str], scale: str, depths: Sequence[int]) -> list[Rule]:
    """Groups of `prefix`: the stage; then comes the block. Stages but the first start with a downsampling."""

    def number(stage: str, block: str) -> int:
        return sum(depths[: int(stage)]) + int(stage) + int(block)

    def part(match: re.Match[str]) -> str:
        return f"layers.{number(match[1], match[2])}.{parts[match[3]]}.{match[4]}"

    return [
        Rename(rf"{prefix}\.(\d+)\.{scale}", lambda m: f"layers.{number(m[1], m[2])}.scale.gamma"),
        Rename(rf"{prefix}\.(\d+)\.({'|'.join(map(re.escape, parts))})\.(weight|bias)", part),
    ]
