"""Facts about the names of backbones: every official tensor has a place, or is dropped for a reason."""

from __future__ import annotations

import pytest
import torch

from stepwell.encoders.catalogue import build_encoder
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import convert, plan


def block(prefix: str, parts: list[str], kinds: tuple[str, ...] = ("weight", "bias")) -> list[str]:
    return [f"{prefix}.{part}.{kind}" for part in parts for kind in kinds]


PLAIN = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
UNIPERCEIVER = ["norm1", "self_attn.in_proj", "self_attn.out_proj", "norm2", "linear1", "linear2"]
OFFICIAL = {
    "deit": [
        "pos_embed",
        *block("patch_embed", ["proj"]),
        *block("blocks.0", PLAIN),
        "blocks.0.gamma_1",
        "blocks.0.gamma_2",
    ],
    "internvit": [
        "pos_embed",
        *block("patch_embed", ["proj"]),
        *block("blocks.0", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
        *block("blocks.0", ["norm1", "norm2", "attn.q_norm", "attn.k_norm"], ("weight",)),
        "blocks.0.ls1.gamma",
        "blocks.0.ls2.gamma",
    ],
    "uniperceiver": [
        *block("visual_embed", ["patch_embed.proj", "embeddings_norm"]),
        "visual_embed.patch_embed.spatial_pos_embed.weight",
        "visual_embed.patch_embed.temporal_pos_embed.weight",
        *block("layers.0", UNIPERCEIVER),
        "layers.0.gamma_1",
        "layers.0.gamma_2",
    ],
}


@pytest.mark.parametrize(
    ("naming", "encoder", "arguments"),
    [
        ("deit", "deit_t", {}),
        ("internvit", "deit_t", {"norm": "rmsnorm", "qk_norm": True}),
        ("uniperceiver", "uniperceiver_b", {}),
    ],
)
def test_official_names_fill_the_whole_encoder(naming: str, encoder: str, arguments: dict) -> None:
    with torch.device("meta"):
        ours = build_encoder(encoder, depth=1, **arguments)
    result = plan(OFFICIAL[naming], backbone_rules(naming))
    assert not result.unknown
    assert result.targets.keys() == ours.state_dict().keys()


def test_clip_joins_queries_keys_and_values_in_this_order() -> None:
    parts = {
        f"encoder.layers.3.self_attn.{p}_proj.weight": torch.full((2, 2), i) for i, p in enumerate("qkv")
    }
    for prefix in ("", "clip_model.", "vision_model."):
        state = dict(reversed([(prefix + name, tensor) for name, tensor in parts.items()]))
        joined = convert(state, backbone_rules("clip"))["blocks.3.attn.qkv.weight"]
        assert joined[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_beit_has_no_key_bias() -> None:
    state = {"blocks.0.attn.v_bias": torch.ones(2) * 3, "blocks.0.attn.q_bias": torch.ones(2)}
    assert convert(state, backbone_rules("beit"))["blocks.0.attn.qkv.bias"].tolist() == [1, 1, 0, 0, 3, 3]


def test_the_class_slot_of_internvit_goes_when_nothing_uses_it() -> None:
    table = torch.arange(10.0).view(1, 5, 2)
    assert convert({"pos_embed": table}, backbone_rules("internvit"))["position.table"][0, 0] == 2
    with_slot = convert({"pos_embed": table}, backbone_rules("internvit", class_token=True, class_slot=True))
    assert torch.equal(with_slot["position.table"], table[0])


def test_class_token_and_final_norm_are_used_or_dropped_for_a_reason() -> None:
    names = ["cls_token", "norm.weight", "norm.bias"]
    assert plan(names, backbone_rules("deit")).dropped.keys() == set(names)
    result = plan(names, backbone_rules("deit", class_token=True, final_norm=True))
    assert result.targets.keys() == {"class_token", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("naming", ["convnext_hf", "convnext_timm"])
def test_convnext_layers_are_numbered_with_their_downsampling(naming: str) -> None:
    """depths 2, 1, 3: stage 1 begins at entry 2, its block is 3; stage 2 begins at 4, its blocks follow."""
    if naming == "convnext_hf":
        down, block_ = (
            "encoder.stages.{}.downsampling_layer.1.weight",
            "encoder.stages.{}.layers.{}.dwconv.weight",
        )
    else:
        down, block_ = "stages.{}.downsample.1.weight", "stages.{}.blocks.{}.conv_dw.weight"
    blocks = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    names = [block_.format(*at) for at in blocks] + [down.format(s) for s in (1, 2)]
    result = plan(["convnext_model." + name for name in names], backbone_rules(naming, depths=(2, 1, 3)))
    numbers = [name.split(".")[1:3] for name in result.targets]
    assert numbers == [[str(i), "dwconv"] for i in (0, 1, 3, 5, 6, 7)] + [["2", "conv"], ["4", "conv"]]


@pytest.mark.parametrize("name", ["gamma", "weight"])
def test_timms_layer_scale_is_known_by_its_name_and_by_piip_llavas(name: str) -> None:
    result = plan([f"stages.0.blocks.1.{name}"], backbone_rules("convnext_timm", depths=(2,)))
    assert list(result.targets) == ["layers.1.scale.gamma"]


def test_an_unknown_naming_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown naming 'swin'"):
        backbone_rules("swin")


@pytest.mark.parametrize("naming", ["deit", "beit", "clip", "uniperceiver", "convnext_hf", "timm_vit"])
def test_a_strange_name_is_unknown_rather_than_dropped(naming: str) -> None:
    assert plan(["blocks.0.attn.lora_a"], backbone_rules(naming, depths=(1,))).unknown
