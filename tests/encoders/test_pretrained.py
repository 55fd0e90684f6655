"""Weights of timm and transformers, saved here and loaded into ours, compute what they computed there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.pretrained import fit_tables, load_encoder_state, load_encoder_weights
from stepwell.encoders.vit import VisionTransformer
from stepwell.folders import HubError
from stepwell.layers.position import relative_position_bias
from stepwell.structures import TokenMap

SIZE: dict[str, Any] = {"dim": 32, "depth": 2, "num_heads": 4}
HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}
AS_PRETRAINED: dict[str, Any] = {
    **SIZE,
    "position_grid": (4, 4),
    "class_token": True,
    "class_slot": True,
    "final_norm": True,
}
CONVNEXT: dict[str, Any] = {"dims": (8, 12, 16, 24), "depths": (1, 2, 2, 1)}


def drawn(model: nn.Module) -> nn.Module:
    """No weight left at a zero or a one that would hide a mistake."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model.eval()


def save_timm(model: nn.Module, folder: Path, *, side: int) -> Path:
    """What timm's hub folders hold."""
    config = {
        "architecture": model.default_cfg["architecture"],
        "pretrained_cfg": {"input_size": [3, side, side]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def same(ours: TokenMap, theirs: Tensor) -> None:
    tokens = ours.tokens if ours.class_token is None else torch.cat([ours.class_token, ours.tokens], 1)
    torch.testing.assert_close(tokens, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"layer_scale": None}),
        ("deit3_small_patch16_224", {"layer_scale": 1.0, "class_slot": False}),
        ("vit_small_patch14_dinov2", {"layer_scale": 1.0, "patch": 14}),
    ],
)
def test_timm_vision_transformers(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    side = 4 * arguments.get("patch", 16)
    extra = {"init_values": 1.0} if arguments["layer_scale"] else {}
    theirs = drawn(timm.create_model(name, embed_dim=32, depth=2, num_heads=4, img_size=side, **extra))
    ours = VisionTransformer(**{**AS_PRETRAINED, **arguments}).eval()
    left_out = load_encoder_weights(ours, save_timm(theirs, tmp_path, side=side))
    assert not [name for name in left_out if name.endswith(".gamma")]
    image = torch.randn(2, 3, side, side)
    with torch.no_grad():
        same(ours(image), theirs.forward_features(image))


def test_timm_convnext(tmp_path: Path) -> None:
    theirs = drawn(timm.create_model("convnext_tiny", **CONVNEXT))
    ours = ConvNeXt(**CONVNEXT).eval()
    load_encoder_weights(ours, save_timm(theirs, tmp_path, side=224))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.to_map(ours(image)), theirs.forward_features(image), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("whole", [False, True])
def test_transformers_clip_alone_or_with_its_text_half(whole: bool, tmp_path: Path) -> None:
    if whole:
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        config = transformers.CLIPConfig(text_config={**text, "vocab_size": 9}, vision_config=HF)
        model = drawn(transformers.CLIPModel(config))
        theirs = model.vision_model
    else:
        model = theirs = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)))
    model.save_pretrained(tmp_path)
    arguments = {"patch_bias": False, "norm_eps": 1e-5, "activation": "quick_gelu", "embed_norm": True}
    ours = VisionTransformer(**{**AS_PRETRAINED, **arguments, "final_norm": False}).eval()
    left_out = load_encoder_weights(ours, tmp_path)
    assert "this encoder ends before the final norm" in left_out.values()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        hidden = theirs(image, output_hidden_states=True).hidden_states
        same(ours(image), hidden[-1])
        same(ours.run(ours.stem(image), 0, len(ours.blocks) - 2), hidden[-2])
        same(ours.stem(image), hidden[0])


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_transformers_vit_and_dinov2(kind: str, tmp_path: Path) -> None:
    if kind == "vit":
        theirs = drawn(transformers.ViTModel(transformers.ViTConfig(**HF)))
    else:
        theirs = drawn(transformers.Dinov2Model(transformers.Dinov2Config(**HF)))
    theirs.save_pretrained(tmp_path)
    eps = {"vit": 1e-12, "dinov2": 1e-6}[kind]
    scale = {"vit": None, "dinov2": 1.0}[kind]
    ours = VisionTransformer(**AS_PRETRAINED, norm_eps=eps, layer_scale=scale).eval()
    load_encoder_weights(ours, tmp_path)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        same(ours(image), theirs(image).last_hidden_state)


def test_transformers_masked_autoencoder(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**HF, mask_ratio=0.0)
    theirs = drawn(transformers.ViTMAEModel(config))
    theirs.save_pretrained(tmp_path)
    ours = VisionTransformer(**AS_PRETRAINED, norm_eps=1e-12).eval()
    load_encoder_weights(ours, tmp_path)
    image = torch.randn(1, 3, 64, 64)
    with (
        torch.no_grad()
    ):  # with nothing masked, only the order of the patches is random: noise in rising order
        same(ours(image), theirs(image, noise=torch.arange(16.0)[None]).last_hidden_state)


def test_transformers_convnext(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(hidden_sizes=list(CONVNEXT["dims"]), depths=list(CONVNEXT["depths"]))
    theirs = drawn(transformers.ConvNextModel(config))
    theirs.save_pretrained(tmp_path)
    ours = ConvNeXt(**CONVNEXT).eval()
    load_encoder_weights(ours, tmp_path)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        map = theirs(image).last_hidden_state
        torch.testing.assert_close(ours.to_map(ours(image)), map, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_beit_blocks_have_the_bias_of_theirs_between_patches(library: str, tmp_path: Path) -> None:
    """Theirs always have a class token, so it is not the outputs that can be compared."""
    if library == "timm":
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 64}
        theirs = drawn(timm.create_model("beitv2_base_patch16_224", **sizes))
        save_timm(theirs, tmp_path, side=64)
        bias = theirs.blocks[1].attn._get_rel_pos_bias()[0]
    else:
        theirs = drawn(transformers.BeitModel(transformers.BeitConfig(**HF, use_relative_position_bias=True)))
        theirs.save_pretrained(tmp_path)
        tables = [m for m in theirs.modules() if hasattr(m, "relative_position_bias_table")]
        bias = tables[1]((4, 4), interpolate_pos_encoding=False)[0]
    ours = VisionTransformer(**SIZE, position="relative", windows=4, layer_scale=1.0)
    load_encoder_weights(ours, tmp_path)
    layer = ours.blocks[1].attn
    torch.testing.assert_close(relative_position_bias(layer.relative_table, (4, 4)), bias[:, 1:, 1:])
    dim = 32
    assert torch.equal(layer.qkv.bias[dim : 2 * dim], torch.zeros(dim))
    assert layer.qkv.bias[:dim].abs().min() > 0


def test_tables_and_kernels_are_fitted_on_the_way(tmp_path: Path) -> None:
    """Patch 14 and grid 4 x 4 with a class slot -> patch 16, grid 3 x 5, no class token."""
    theirs = drawn(
        timm.create_model("vit_small_patch14_dinov2", embed_dim=32, depth=2, num_heads=4, img_size=56)
    )
    ours = VisionTransformer(**SIZE, position_grid=(3, 5), windows=2, layer_scale=1.0)
    load_encoder_weights(ours, save_timm(theirs, tmp_path, side=56))
    table = theirs.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    resized = F.interpolate(table, (3, 5), mode="bicubic").flatten(2).mT[0]
    torch.testing.assert_close(ours.position.table, resized)
    kernel = F.interpolate(theirs.patch_embed.proj.weight, (16, 16), mode="bicubic")
    torch.testing.assert_close(ours.patch_embed.proj.weight, kernel)


def test_layer_scales_that_the_source_lacks_keep_their_initial_value() -> None:
    theirs = drawn(timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64))
    ours = VisionTransformer(**SIZE, position_grid=(4, 4), layer_scale=1.0)
    left_out = load_encoder_state(ours, theirs.state_dict(), naming="timm_vit", image_size=(64, 64))
    scales = {name for name in left_out if name.endswith(".gamma")}
    assert scales == {f"blocks.{i}.scale{j}.gamma" for i in (0, 1) for j in (1, 2)}
    assert left_out["head.weight"] == "classifier"
    assert torch.equal(ours.blocks[1].scale2.gamma, torch.ones(32))


def test_one_shared_relative_table_goes_to_every_block() -> None:
    ours = VisionTransformer(dim=8, depth=2, num_heads=2, position="relative", windows=[3, 4], patch=2)
    shared = torch.randn(25 + 3, 2)
    plain = VisionTransformer(dim=8, depth=2, num_heads=2, position="none", patch=2).state_dict()
    state = {name: t for name, t in plain.items() if not name.endswith("qkv.bias")}
    state |= {f"blocks.{i}.attn.{kind}_bias": torch.randn(8) for i in (0, 1) for kind in "qv"}
    state["rel_pos_bias.relative_position_bias_table"] = shared
    load_encoder_state(ours, state, naming="beit", image_size=(6, 6))
    assert torch.equal(ours.blocks[0].attn.relative_table, shared[:25])
    assert ours.blocks[1].attn.relative_table.shape == (49, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 64}, r"position\.table: copying .*\[16, 32\].* is torch\.Size\(\[16, 64\]\)"),
        ({"depth": 1}, r"no place for 12 tensors: blocks\.1"),
        ({"depth": 3}, r"lacks 12 tensors of this encoder: blocks\.2"),
        ({"qk_norm": True}, r"lacks 4 tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    state = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64
    ).state_dict()
    ours = VisionTransformer(**{**SIZE, "position_grid": (4, 4), **change})
    with pytest.raises(ValueError, match=says):
        load_encoder_state(ours, state, naming="timm_vit", image_size=(64, 64))


def test_a_class_slot_that_the_source_lacks_is_refused() -> None:
    state = {"position.table": torch.zeros(16, 8)}
    with pytest.raises(ValueError, match="class_slot=False"):
        fit_tables(state, patch=16, source_grid=(4, 4), position_grid=(4, 4), class_slot=True)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"no safetensors .*pytorch_model\.bin"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path)
    with pytest.raises(ValueError, match="no safetensors"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path / "pytorch_model.bin", naming="timm_vit")


def test_shards_are_read_together_and_copies_under_other_names_left_alone(tmp_path: Path) -> None:
    state = VisionTransformer(**SIZE, position="none").state_dict()
    names = sorted(state)
    save_file({n: state[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"visual.trunk.a": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    ours = VisionTransformer(**SIZE, position="none")
    load_encoder_weights(ours, tmp_path, naming="timm_vit")
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path, naming="timm_vit")


def test_what_is_neither_here_nor_a_hub_name_is_refused() -> None:
    for source in ("./nowhere", "/nowhere/at/all", "nowhere"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_encoder_weights(VisionTransformer(**SIZE), source)
    with pytest.raises(HubError, match="owner/name is not on this machine"):
        load_encoder_weights(VisionTransformer(**SIZE), "owner/name")


def test_a_folder_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type llama .* none of beit, clip"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path)
