"""Facts about the named encoders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from stepwell.encoders.catalogue import ENCODERS, build_encoder, encoder_spec
from stepwell.encoders.convnext import ConvNeXt

TIMM = {
    "deit_t": "deit_tiny_patch16_224.fb_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "dinov2_s_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_l_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "siglip_b": "vit_base_patch16_siglip_gap_224.webli",
    "siglip_l_384": "vit_large_patch16_siglip_gap_384.webli",
    "siglip_so400m_384": "vit_so400m_patch14_siglip_gap_384.webli",
    "deit3_s": "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "deit3_b": "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deit3_l": "deit3_large_patch16_224.fb_in22k_ft_in1k",
    "deit3_s_384": "deit3_small_patch16_384.fb_in22k_ft_in1k",
    "deit3_b_384": "deit3_base_patch16_384.fb_in22k_ft_in1k",
    "deit3_l_384": "deit3_large_patch16_384.fb_in22k_ft_in1k",
    "augreg_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "augreg_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "augreg_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "augreg_s_384": "vit_small_patch16_384.augreg_in21k_ft_in1k",
    "augreg_b_384": "vit_base_patch16_384.augreg_in21k_ft_in1k",
    "augreg_l_384": "vit_large_patch16_384.augreg_in21k_ft_in1k",
    "mae_b": "vit_base_patch16_224.mae",
    "mae_l": "vit_large_patch16_224.mae",
    "mae_h": "vit_huge_patch14_224.mae",
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l": "vit_large_patch14_dinov2.lvd142m",
    "beitv2_b": "beitv2_base_patch16_224.in1k_ft_in22k",
    "beitv2_l": "beitv2_large_patch16_224.in1k_ft_in22k",
    "convnext_b_clip": "convnext_base.clip_laiona_augreg_320",
    "convnext_l_clip": "convnext_large_mlp.clip_laion2b_ft_320",
}
"""Those whose weights timm has, by its name for them."""


def on_meta(name: str, **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return build_encoder(name, **overrides)


def linear_weights(model: torch.nn.Module) -> int:
    """Numbers in all linear layers, heads not counted."""
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
    return sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("name", sorted(TIMM))
def test_sizes_and_statistics_are_those_of_timms_model_of_that_name(name: str) -> None:
    theirs, ours = timm.get_pretrained_cfg(TIMM[name]), on_meta(name)
    with torch.device("meta"):
        model = timm.create_model(TIMM[name], pretrained=False, num_classes=0)
    assert (ours.spec.mean, ours.spec.std) == (theirs.mean, theirs.std)
    assert ours.spec.dim == model.num_features
    assert linear_weights(ours) == linear_weights(model)


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - TIMM.keys()))
def test_statistics_of_the_others_are_openais_for_clip_and_else_those_of_imagenet(name: str) -> None:
    """As in the preprocessors of openai/clip-*, facebook/convnext-*-224, InternViT-6B and Uni-Perceiver."""
    spec = encoder_spec(name)
    if ENCODERS[name].family == "clip":
        assert (list(spec.mean), list(spec.std)) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    else:
        assert (list(spec.mean), list(spec.std)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_t", 5.52),
        ("vit_s", 21.7),
        ("vit_b", 85.8),
        ("vit_l", 303.3),
        ("mae_h", 631.0),
        ("internvit_6b", 5903),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    count = sum(p.numel() for p in on_meta(name).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)


def test_overrides_reach_the_constructor() -> None:
    encoder = on_meta("deit_t", windows=14, depth=2)
    assert [block.attn.window for block in encoder.blocks] == [14, 14]


def test_every_entry_builds_with_tuples_or_the_lists_that_json_makes_of_them() -> None:
    encoder = build_encoder("vit_nano", position="relative", position_grid=[2, 3], depth=1)
    assert encoder(torch.randn(1, 3, 32, 48)).size == (2, 3)
    assert isinstance(build_encoder("convnext_nano", dims=[8, 8, 8, 8]), ConvNeXt)


@pytest.mark.parametrize("name", ["vit_nano", "convnext_nano"])
def test_the_smallest_encoders_have_stride_16(name: str) -> None:
    encoder = build_encoder(name).eval()
    assert encoder.spec.stride == 16
    assert encoder(torch.randn(1, 3, 64, 96)).size == (4, 6)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_spec_from_arguments_is_that_of_the_network(name: str) -> None:
    assert encoder_spec(name) == on_meta(name).spec


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_t", {"windows": [7, 0], "depth": 2, "patch": 8, "mean": [0.1, 0.2, 0.3]}),
        ("convnext_t", {"dims": [8, 16], "depths": [2, 1], "strides": [4, 3], "std": [0.1, 0.2, 0.3]}),
    ],
)
def test_a_spec_follows_the_arguments_lists_of_json_included(name: str, arguments: dict) -> None:
    spec = encoder_spec(name, arguments)
    assert spec == on_meta(name, **arguments).spec
    hash(spec)


def test_a_spec_takes_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    spec = encoder_spec("internvit_6b")
    assert (spec.dim, spec.depth, spec.stride) == (3200, 48, 16)


@pytest.mark.parametrize("build", [build_encoder, lambda name, **arguments: encoder_spec(name, arguments)])
def test_an_unknown_name_or_argument_is_answered_with_the_known_ones(build: Callable) -> None:
    with pytest.raises(ValueError, match=r"unknown encoder 'vit_xxl'; choose from .*vit_b"):
        build("vit_xxl")
    with pytest.raises(ValueError, match=r"'deit_t' has no argument 'window'; it has .*windows"):
        build("deit_t", window=14)
    with pytest.raises(ValueError, match="12 blocks need one window each, got 2"):
        build("deit_t", windows=[7, 7])
