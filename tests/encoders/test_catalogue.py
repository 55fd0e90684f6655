"""Facts about the named encoders."""

from __future__ import annotations

import pytest
import timm
import torch

from stepwell.encoders.catalogue import ENCODERS, build_encoder, encoder_spec
from stepwell.encoders.convnext import ConvNeXt

TIMM = {name: entry for name, entry in ENCODERS.items() if entry.source and entry.source.library == "timm"}


def on_meta(name: str, **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return build_encoder(name, **overrides)


def linear_weights(model: torch.nn.Module) -> int:
    """Numbers in all linear layers, heads not counted."""
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
    return sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("name", sorted(TIMM))
def test_sizes_and_statistics_are_those_of_timms_model_of_that_name(name: str) -> None:
    source = TIMM[name].source
    theirs, ours = timm.get_pretrained_cfg(source.name), on_meta(name)
    with torch.device("meta"):
        model = timm.create_model(source.name, pretrained=False, num_classes=0)
    assert (ours.spec.mean, ours.spec.std) == (theirs.mean, theirs.std)
    assert ours.spec.dim == model.num_features
    assert linear_weights(ours) == linear_weights(model)


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


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown encoder 'vit_xxl'; choose from .*vit_b"):
        build_encoder("vit_xxl")


def test_an_unknown_argument_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'deit_t' has no argument 'window'; it has .*windows"):
        build_encoder("deit_t", window=14)


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"internvit_6b"}))
def test_what_arguments_say_of_an_encoder_is_true_of_the_built_one(name: str) -> None:
    with torch.device("meta"):
        assert encoder_spec(name) == build_encoder(name).spec


def test_arguments_that_differ_change_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = encoder_spec("vit_t", {"dim": 8, "depth": 2, "patch": 14, "windows": [0, 7]})
    assert (spec.dims, spec.strides, spec.window) == ((8, 8), (14, 14), 7)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("an encoder was built"))
    assert encoder_spec("internvit_6b").dim == 3200
    with pytest.raises(ValueError, match="'depht'"):
        encoder_spec("vit_t", {"depht": 2})
