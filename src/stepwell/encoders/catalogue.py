"""ENCODERS: the encoders that have a name; encoder_spec() and build_encoder().

An entry holds constructor arguments and the family (told, never guessed from a file name). The arguments are
those of a branch in PIIP's dense models (arXiv 2501.07783): patch 16, no class token, layer scale even where
the weights have none. What a task changes, it overrides: class_token=True for classification, and
class_slot=True, final_norm=True beside it for the network as it was pretrained. Mean and std are those of the
pretraining. `timm:NAME` is any network of timm (encoders/timm_encoder.py).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.pretrained import load_encoder_weights
from stepwell.encoders.resnet import ResNet
from stepwell.encoders.timm_encoder import TimmEncoder, build_timm, timm_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.structures import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD, EncoderSpec

__all__ = ["ENCODERS", "Entry", "Family", "build_encoder", "encoder_arguments", "encoder_spec"]

Family = Literal[
    "vit",
    "deit",
    "deit3",
    "augreg",
    "mae",
    "dinov2",
    "beitv2",
    "uniperceiver",
    "clip",
    "siglip",
    "internvit",
    "convnext",
    "convnext_clip",
    "resnet",
]


TIMM = "timm:"
"""Before a name of timm's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A named encoder."""

    family: Family
    build: type[VisionTransformer] | type[ConvNeXt] | type[ResNet]
    arguments: Mapping[str, Any]


def encoder_arguments(name: str, overrides: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The entry's arguments and those that differ, the lists that JSON makes of tuples undone.

    Raises ValueError unless there is an encoder of this name with constructor arguments of these names; those
    of timm are known to timm alone.
    """
    if name.startswith(TIMM):
        return _with_tuples(overrides)
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; choose from {', '.join(sorted(ENCODERS))}, {TIMM}NAME")
    known = inspect.signature(ENCODERS[name].build).parameters
    if unknown := sorted(overrides.keys() - known.keys()):
        raise ValueError(
            f"encoder {name!r} has no argument {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(sorted(known))}"
        )
    return _with_tuples({**ENCODERS[name].arguments, **overrides})


def _with_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def encoder_spec(name: str, arguments: Mapping[str, Any] = {}) -> EncoderSpec:
    """`build_encoder(name, **arguments).spec` without weights in memory; the same errors."""
    merged = encoder_arguments(name, arguments)
    if name.startswith(TIMM):
        return _timm_spec(name.removeprefix(TIMM), json.dumps(merged, sort_keys=True))
    build = ENCODERS[name].build
    call = inspect.signature(build).bind(**merged)
    call.apply_defaults()
    needed = inspect.signature(build.spec_of).parameters
    return build.spec_of(**{key: call.arguments[key] for key in needed})


@lru_cache
def _timm_spec(name: str, arguments: str) -> EncoderSpec:
    """arguments: as JSON, which can be kept as a key."""
    return timm_spec(name, **_with_tuples(json.loads(arguments)))


def build_encoder(
    name: str, /, *, weights: str | Path | None = None, revision: str | None = None, **overrides: Any
) -> VisionTransformer | ConvNeXt | ResNet | TimmEncoder:
    """An encoder of the catalogue; `overrides` are constructor arguments that differ.

    weights, revision: a folder, a file or a name on the hub, as for `load_encoder_weights`; None leaves
    random ones.
    Raises ValueError for a name or an argument that does not exist, and what loading raises.
    """
    arguments = encoder_arguments(name, overrides)
    encoder: VisionTransformer | ConvNeXt | ResNet | TimmEncoder
    if name.startswith(TIMM):
        encoder = build_timm(name.removeprefix(TIMM), **arguments)
    else:
        encoder = ENCODERS[name].build(**arguments)
    if weights is not None:
        load_encoder_weights(encoder, weights, revision=revision)
    return encoder


_TINY: dict[str, Any] = {"dim": 192, "depth": 12, "num_heads": 3}
_SMALL: dict[str, Any] = {"dim": 384, "depth": 12, "num_heads": 6}
_BASE: dict[str, Any] = {"dim": 768, "depth": 12, "num_heads": 12}
_LARGE: dict[str, Any] = {"dim": 1024, "depth": 24, "num_heads": 16}
_HUGE: dict[str, Any] = {"dim": 1280, "depth": 32, "num_heads": 16}
_SO400M: dict[str, Any] = {"dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 4304.5 / 1152}


def _vit(family: Family, **arguments: Any) -> Entry:
    return Entry(family=family, build=VisionTransformer, arguments=arguments)


def _timm(family: Family, size: dict[str, Any], **arguments: Any) -> Entry:
    """A plain ViT of timm as PIIP takes it over: layer scale 1 where the weights bring none."""
    return _vit(family, **{**size, "layer_scale": 1.0, **arguments})


def _augreg(size: dict[str, Any], grid: int) -> Entry:
    return _timm("augreg", size, position_grid=(grid, grid), mean=HALF_MEAN, std=HALF_STD)


def _dinov2(size: dict[str, Any]) -> Entry:
    """Patch 14 at 518 pixels (grid 37), taken over at patch 16 (grid 518 // 16 = 32)."""
    return _timm("dinov2", size, position_grid=(32, 32))


def _dinov2_registers(size: dict[str, Any]) -> Entry:
    """As pretrained, patch 14: four registers, and a table that was resized with antialiasing."""
    arguments = {"patch": 14, "position_grid": (37, 37), "class_token": True, "class_slot": True}
    return _timm("dinov2", size, **arguments, registers=4, antialias=True)


def _siglip(size: dict[str, Any], *, side: int, patch: int) -> Entry:
    """Without a class token (arXiv 2303.15343); its pooling head is not taken over."""
    grid = (side // patch, side // patch)
    half = {"mean": HALF_MEAN, "std": HALF_STD}
    return _vit("siglip", **size, patch=patch, position_grid=grid, activation="gelu_tanh", **half)


def _beitv2(size: dict[str, Any]) -> Entry:
    """Windows of 28 cells, as in PIIP; the weights' one table of 14 x 14 is resized for every layer."""
    return _timm("beitv2", size, position="relative", layer_scale=1e-6, windows=28)


def _uniperceiver(size: dict[str, Any]) -> Entry:
    return _vit("uniperceiver", **size, norm_eps=1e-5, layer_scale=0.0, temporal_rows=8, embed_norm=True)


def _clip(size: dict[str, Any], grid: int, *, patch: int = 16) -> Entry:
    return _vit(
        "clip",
        **size,
        patch=patch,
        patch_bias=False,
        norm_eps=1e-5,
        activation="quick_gelu",
        position_grid=(grid, grid),
        class_token=True,
        class_slot=True,
        embed_norm=True,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


def _convnext(family: Family, width: int, depth: int, **arguments: Any) -> Entry:
    sizes = {"dims": (width, 2 * width, 4 * width, 8 * width), "depths": (3, 3, depth, 3)}
    return Entry(family=family, build=ConvNeXt, arguments={**sizes, **arguments})


def _resnet(depths: tuple[int, ...], **arguments: Any) -> Entry:
    return Entry(family="resnet", build=ResNet, arguments={"depths": depths, **arguments})


def _bottlenecks(depth: int) -> Entry:
    return _resnet((3, 4, depth, 3), dims=(256, 512, 1024, 2048), layer="bottleneck")


def _laion(width: int, depth: int) -> Entry:
    return _convnext("convnext_clip", width, depth, mean=CLIP_MEAN, std=CLIP_STD)


ENCODERS: dict[str, Entry] = {
    "vit_nano": _vit("vit", dim=64, depth=4, num_heads=2, position="sincos"),
    "vit_t": _vit("vit", **_TINY),
    "vit_s": _vit("vit", **_SMALL),
    "vit_b": _vit("vit", **_BASE),
    "vit_l": _vit("vit", **_LARGE),
    "deit_t": _timm("deit", _TINY),
    "deit_s": _timm("deit", _SMALL),
    "deit_b": _timm("deit", _BASE),
    "deit3_s": _timm("deit3", _SMALL),
    "deit3_b": _timm("deit3", _BASE),
    "deit3_l": _timm("deit3", _LARGE),
    "deit3_s_384": _timm("deit3", _SMALL, position_grid=(24, 24)),
    "deit3_b_384": _timm("deit3", _BASE, position_grid=(24, 24)),
    "deit3_l_384": _timm("deit3", _LARGE, position_grid=(24, 24)),
    "augreg_s": _augreg(_SMALL, 14),
    "augreg_b": _augreg(_BASE, 14),
    "augreg_l": _augreg(_LARGE, 14),
    "augreg_s_384": _augreg(_SMALL, 24),
    "augreg_b_384": _augreg(_BASE, 24),
    "augreg_l_384": _augreg(_LARGE, 24),
    "mae_b": _timm("mae", _BASE),
    "mae_l": _timm("mae", _LARGE),
    "mae_h": _timm("mae", _HUGE),
    "dinov2_s": _dinov2(_SMALL),
    "dinov2_b": _dinov2(_BASE),
    "dinov2_l": _dinov2(_LARGE),
    "dinov2_s_reg": _dinov2_registers(_SMALL),
    "dinov2_b_reg": _dinov2_registers(_BASE),
    "dinov2_l_reg": _dinov2_registers(_LARGE),
    "beitv2_b": _beitv2(_BASE),
    "beitv2_l": _beitv2(_LARGE),
    "uniperceiver_b": _uniperceiver(_BASE),
    "uniperceiver_l": _uniperceiver(_LARGE),
    "clip_b": _clip(_BASE, 14),
    "clip_l": _clip(_LARGE, 14),
    "clip_l_336": _clip(_LARGE, 21),
    "clip_l_14_336": _clip(_LARGE, 24, patch=14),
    "siglip_b": _siglip(_BASE, side=224, patch=16),
    "siglip_l_384": _siglip(_LARGE, side=384, patch=16),
    "siglip_so400m_384": _siglip(_SO400M, side=384, patch=14),
    "internvit_6b": _vit(
        "internvit",
        dim=3200,
        depth=48,
        num_heads=25,
        qkv_bias=False,
        qk_norm=True,
        norm="rmsnorm",
        layer_scale=0.1,
    ),
    "convnext_nano": Entry(
        family="convnext",
        build=ConvNeXt,
        arguments={
            "dims": (32, 48, 64, 96),
            "depths": (1, 1, 2, 1),
            "strides": (4, 2, 2, 1),
            "stem_kernel": 7,
            "kernel_size": 3,
            "activation": "relu",
            "layer_scale": None,
        },
    ),
    "convnext_t": _convnext("convnext", 96, 9),
    "convnext_s": _convnext("convnext", 96, 27),
    "convnext_b": _convnext("convnext", 128, 27),
    "convnext_l": _convnext("convnext", 192, 27),
    "convnext_b_clip": _laion(128, 27),
    "convnext_l_clip": _laion(192, 27),
    "resnet_nano": _resnet((1, 1, 1), dims=(32, 48, 96), stem_dim=32),
    "resnet_18": _resnet((2, 2, 2, 2)),
    "resnet_34": _resnet((3, 4, 6, 3)),
    "resnet_50": _bottlenecks(6),
    "resnet_101": _bottlenecks(23),
}
