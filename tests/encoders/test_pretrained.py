"""Weights of timm, transformers and the authors of networks, saved here and loaded into ours, compute what
they computed there. Nothing is downloaded: what the authors' files hold is written here in their layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.encoders import pretrained
from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.pretrained import load_encoder_state, load_encoder_weights
from stepwell.encoders.vit import VisionTransformer
from stepwell.folders import HubError
from stepwell.keys.backbones import recognise
from stepwell.keys.checkpoint import CheckpointError
from stepwell.keys.engine import convert
from stepwell.keys.report import FitError
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
    tokens = [token for token in (ours.class_token, ours.registers, ours.tokens) if token is not None]
    torch.testing.assert_close(torch.cat(tokens, 1), theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"layer_scale": None}),
        ("deit3_small_patch16_224", {"layer_scale": 1.0, "class_slot": False}),
        ("vit_small_patch14_dinov2", {"layer_scale": 1.0, "patch": 14}),
        (
            "vit_small_patch14_reg4_dinov2",
            {"layer_scale": 1.0, "patch": 14, "registers": 4, "class_slot": False, "antialias": True},
        ),
        ("deit_tiny_distilled_patch16_224", {"registers": 1, "layer_scale": None}),
    ],
)
def test_timm_vision_transformers(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    side = 4 * arguments.get("patch", 16)
    extra = {"init_values": 1.0} if arguments["layer_scale"] else {}
    theirs = drawn(timm.create_model(name, embed_dim=32, depth=2, num_heads=4, img_size=side, **extra))
    ours = VisionTransformer(**{**AS_PRETRAINED, **arguments}).eval()
    report = load_encoder_weights(ours, save_timm(theirs, tmp_path, side=side))
    assert report.ok
    assert not report.absent
    assert not report.resized
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
    report = load_encoder_weights(ours, tmp_path)
    assert "this encoder ends before the final norm" in report.dropped.values()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        hidden = theirs(image, output_hidden_states=True).hidden_states
        same(ours(image), hidden[-1])
        same(ours.run(ours.stem(image), 0, len(ours.blocks) - 2), hidden[-2])
        same(ours.stem(image), hidden[0])


FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**HF)), {"norm_eps": 1e-12}),
    "deit": (
        lambda: transformers.DeiTModel(transformers.DeiTConfig(**HF)),
        {"norm_eps": 1e-12, "registers": 1},
    ),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)), {"layer_scale": 1.0}),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**HF, num_register_tokens=3)
        ),
        {"layer_scale": 1.0, "registers": 3, "antialias": True},
    ),
    "clip": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)),
        {
            "patch_bias": False,
            "norm_eps": 1e-5,
            "activation": "quick_gelu",
            "embed_norm": True,
            "final_norm": False,
        },
    ),
    "siglip": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)),
        {"class_token": False, "class_slot": False, "activation": "gelu_tanh"},
    ),
}
"""transformers' network of two small layers, and the arguments of ours beside AS_PRETRAINED."""


@pytest.mark.parametrize("size", [(64, 64), (48, 48), (96, 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_vision_transformers_at_any_image_size(
    family: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """Position tables are resized as the family does it: with antialiasing for Dinov2WithRegisters alone."""
    build, arguments = FAMILIES[family]
    theirs = drawn(build())
    theirs.save_pretrained(tmp_path)
    ours = VisionTransformer(**{**AS_PRETRAINED, **arguments}).eval()
    report = load_encoder_weights(ours, tmp_path)
    assert report.ok
    assert not report.absent
    assert not report.notes
    image = torch.randn(2, 3, *size)
    resizes = {} if family in ("dinov2", "dinov2_with_registers") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        same(ours(image), theirs(image, **resizes).last_hidden_state)


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
    report = load_encoder_weights(ours, save_timm(theirs, tmp_path, side=56))
    table = theirs.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    resized = F.interpolate(table, (3, 5), mode="bicubic").flatten(2).mT[0]
    torch.testing.assert_close(ours.position.table, resized)
    assert report.resized == {
        "position.table": "16x32 -> 15x32",
        "patch_embed.proj.weight": "32x3x14x14 -> 32x3x16x16",
    }
    assert "resized      2" in report.text()
    kernel = F.interpolate(theirs.patch_embed.proj.weight, (16, 16), mode="bicubic")
    torch.testing.assert_close(ours.patch_embed.proj.weight, kernel)


def test_layer_scales_that_the_source_lacks_keep_their_initial_value() -> None:
    theirs = drawn(timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64))
    ours = VisionTransformer(**SIZE, position_grid=(4, 4), layer_scale=1.0)
    report = load_encoder_state(ours, theirs.state_dict())
    assert set(report.absent) == {f"blocks.{i}.scale{j}.gamma" for i in (0, 1) for j in (1, 2)}
    assert report.dropped["head.weight"] == "classifier"
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
        ({"dim": 64}, r"27 of another shape \(position\.table: expected 16x64, got 16x32\)"),
        ({"depth": 1}, r"12 unknown \(blocks\.1\.norm1\.weight\)"),
        ({"depth": 3}, r"12 missing \(blocks\.2\.norm1\.weight\)"),
        ({"qk_norm": True}, r"4 missing \(blocks\.0\.attn\.q_norm\.weight\)"),
        ({"registers": 2}, r"1 missing \(registers\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    state = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64
    ).state_dict()
    ours = VisionTransformer(**{**SIZE, "position_grid": (4, 4), **change})
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(FitError, match=says) as error:
        load_encoder_state(ours, state)
    assert not error.value.report.ok
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("pos_embed", {}),
    "internvit": ("pos_embed", {}),
    "timm_vit": ("pos_embed", {}),
    "transformers_vit": ("vit.embeddings.position_embeddings", {}),
    "clip": ("vision_model.embeddings.position_embedding.weight", {"patch_bias": False}),
    "internvit_hf": ("embeddings.position_embedding", {}),
    "uniperceiver": ("visual_embed.patch_embed.spatial_pos_embed.weight", {}),
    "augreg_npz": ("Transformer/posembed_input/pos_embedding", {}),
}
"""Every naming with a position table, and the table's name."""


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (2, 8), (3, 8)])
@pytest.mark.parametrize("in_front", [0, 1, 2])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("class_slot", [False, True])
@pytest.mark.parametrize("naming", TABLES)
def test_a_class_slot_in_the_table_with_and_without_the_class_token_in_use(
    naming: str, class_slot: bool, class_token: bool, in_front: int, grid: tuple[int, int]
) -> None:
    """3x5 cells and a slot are as many rows as 4x4 cells; 2x8 as many; 3x8 and a slot as many as 5x5."""
    name, arguments = TABLES[naming]
    cells = torch.randn(math.prod(grid), 8)
    rows = torch.cat([torch.randn(in_front, 8), cells])
    encoder = VisionTransformer(
        dim=8,
        depth=1,
        num_heads=1,
        position_grid=grid,
        class_token=class_token,
        class_slot=class_slot,
        **arguments,
    )
    rules = pretrained.backbone_rules(
        naming, class_token=class_token, class_slot=class_slot, grid=encoder.position_grid
    )
    table = convert({name: rows[None]}, rules)["position.table"]
    assert table.shape == encoder.position.table.shape
    assert torch.equal(table[int(class_slot) :], cells)
    if class_slot:
        assert torch.equal(table[0], rows[0] if in_front else torch.zeros(8))
    with torch.no_grad():
        encoder.position.table.copy_(table)
    assert encoder.stem(torch.randn(1, 3, 32, 48)).tokens.shape == (1, 6, 8)  # the slot is no cell


def test_an_unused_class_slot_changes_no_token() -> None:
    """CLIP without its class token keeps its table, and computes what it would without the slot."""
    clip = {**SIZE, "patch_bias": False, "embed_norm": True, "position_grid": (4, 4)}
    with_slot = drawn(VisionTransformer(**clip, class_slot=True))
    without = VisionTransformer(**clip).eval()
    state = dict(with_slot.state_dict())
    state["position.table"] = state["position.table"][1:]
    without.load_state_dict(state)
    image = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        assert torch.equal(with_slot(image).tokens, without(image).tokens)


def official(truth: VisionTransformer, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of `truth` under other names: parts of ours -> parts of theirs."""
    state = {}
    for name, tensor in truth.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor.clone()
    return state


TIMM_NAMES = {"position.table": "pos_embed", "class_token": "cls_token", "scale1": "ls1", "scale2": "ls2"}
DEIT3_NAMES = {**TIMM_NAMES, "scale1.gamma": "gamma_1", "scale2.gamma": "gamma_2"}
INTERN_HF_NAMES = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "position.table": "embeddings.position_embedding",
    "class_token": "embeddings.class_embedding",
    "blocks": "encoder.layers",
    "scale1.gamma": "ls1",
    "scale2.gamma": "ls2",
}
UNI_NAMES = {
    "patch_embed.proj": "visual_embed.patch_embed.proj",
    "position.table": "visual_embed.patch_embed.spatial_pos_embed.weight",
    "position.temporal": "visual_embed.patch_embed.temporal_pos_embed.weight",
    "embed_norm": "visual_embed.embeddings_norm",
    "blocks": "layers",
    "attn.qkv.": "self_attn.in_proj_",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc": "linear",
    "scale1.gamma": "gamma_1",
    "scale2.gamma": "gamma_2",
}
PRETRAINED = {**SIZE, "position_grid": (4, 4), "class_token": True, "class_slot": True}
INTERN = {**PRETRAINED, "qkv_bias": False, "qk_norm": True, "norm": "rmsnorm", "layer_scale": 0.1}
OFFICIAL: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, list[int]], str | None]] = {
    "DeiT": (PRETRAINED, TIMM_NAMES, {"head.weight": [9, 32], "norm.bias": [32]}, "model"),
    "DeiT III": (
        {**PRETRAINED, "class_slot": False, "layer_scale": 1.0},
        DEIT3_NAMES,
        {"head.weight": [9, 32], "norm.bias": [32]},
        "model",
    ),
    "MAE": (
        PRETRAINED,
        TIMM_NAMES,
        {"mask_token": [1, 1, 16], "decoder_pos_embed": [1, 17, 16], "decoder_blocks.0.norm1.weight": [16]},
        "model",
    ),
    "DINOv2": (
        {**PRETRAINED, "registers": 4, "layer_scale": 1.0},
        {**TIMM_NAMES, "registers": "register_tokens"},
        {"mask_token": [1, 32], "norm.weight": [32]},
        None,
    ),
    "InternViT": (INTERN, TIMM_NAMES, {"clip_projector.norm1_q.weight": [32]}, "module"),
    "InternViT on the hub": (INTERN, INTERN_HF_NAMES, {}, None),
    "Uni-Perceiver": (
        {
            **SIZE,
            "position_grid": (4, 4),
            "temporal_rows": 8,
            "embed_norm": True,
            "layer_scale": 0.0,
        },
        UNI_NAMES,
        {},
        "model",
    ),
}
"""For each release: our arguments, its names, what lies beside the backbone, the container of the file."""


@pytest.mark.parametrize("release", OFFICIAL)
def test_the_authors_files(release: str, tmp_path: Path) -> None:
    """Written with torch.save, in containers as they are, found by their names alone."""
    arguments, names, beside, container = OFFICIAL[release]
    truth = drawn(VisionTransformer(**arguments))
    state = official(truth, names) | {name: torch.randn(shape) for name, shape in beside.items()}
    for table in ("pos_embed", "embeddings.position_embedding"):
        if table in state:
            state[table] = state[table][None]
    torch.save(state if container is None else {container: state, "epoch": 3}, tmp_path / "release.pth")
    ours = VisionTransformer(**arguments).eval()
    report = load_encoder_weights(ours, tmp_path / "release.pth")
    assert set(report.dropped) == set(beside)
    assert report.ok
    assert not report.absent
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        theirs, found = truth(image), ours(image)
    assert torch.equal(found.tokens, theirs.tokens)
    assert theirs.class_token is None or torch.equal(found.class_token, theirs.class_token)


@pytest.mark.parametrize("tuned", [False, True])
def test_beit_v2_as_released(tuned: bool, tmp_path: Path) -> None:
    """Pretrained, one relative table is shared and a decoder lies beside; tuned, every block has its own."""
    arguments = {**SIZE, "position": "relative", "windows": 4, "layer_scale": 1e-6}
    truth = drawn(VisionTransformer(**arguments))
    state = official(truth, DEIT3_NAMES)
    state |= {"cls_token": torch.zeros(1, 1, 32), "norm.weight": torch.zeros(32)}
    for i in range(2):
        query, _, value = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        truth.state_dict()[f"blocks.{i}.attn.qkv.bias"][32:64] = 0
        state |= {f"blocks.{i}.attn.q_bias": query, f"blocks.{i}.attn.v_bias": value}
        table = torch.cat([state.pop(f"blocks.{i}.attn.relative_table"), torch.zeros(3, 4)])
        index = torch.zeros(17, 17, dtype=torch.int64)
        if tuned:
            state[f"blocks.{i}.attn.relative_position_bias_table"] = table
            state["fc_norm.bias"] = torch.zeros(32)
            state[f"blocks.{i}.attn.relative_position_index"] = index
        else:
            state["rel_pos_bias.relative_position_bias_table"] = table
            state["rel_pos_bias.relative_position_index"] = index
            truth.blocks[0].attn.relative_table.data.copy_(table[:49])  # the last one is everybody's
            state |= {"mask_token": torch.zeros(1, 1, 32), "cls_pt_layers.0.norm1.bias": torch.zeros(32)}
            state["lm_head.weight"] = torch.zeros(9, 32)
    torch.save({"model": state}, tmp_path / "beitv2.pth")
    ours = VisionTransformer(**arguments).eval()
    assert load_encoder_weights(ours, tmp_path / "beitv2.pth").ok
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(ours(image).tokens, truth(image).tokens)


def test_augregs_jax_files_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    """Random arrays under the names and in the axes of JAX; timm has a reader of its own."""
    draw = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return draw.normal(0, 0.2, shape).astype(np.float32)

    arrays = {
        "embedding/kernel": array(16, 16, 3, 32),
        "embedding/bias": array(32),
        "cls": array(1, 1, 32),
        "Transformer/posembed_input/pos_embedding": array(1, 17, 32),
        "Transformer/encoder_norm/scale": array(32),
        "Transformer/encoder_norm/bias": array(32),
        "head/kernel": array(32, 9),
        "head/bias": array(9),
    }
    for i in range(2):
        layer = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{layer}/{norm}/scale": array(32), f"{layer}/{norm}/bias": array(32)}
        for part in ("query", "key", "value"):
            name = f"{layer}/MultiHeadDotProductAttention_1/{part}"
            arrays |= {f"{name}/kernel": array(32, 4, 8), f"{name}/bias": array(4, 8)}
        arrays[f"{layer}/MultiHeadDotProductAttention_1/out/kernel"] = array(4, 8, 32)
        arrays[f"{layer}/MultiHeadDotProductAttention_1/out/bias"] = array(32)
        for dense, shape in (("Dense_0", (32, 128)), ("Dense_1", (128, 32))):
            arrays |= {f"{layer}/MlpBlock_3/{dense}/kernel": array(*shape)}
            arrays |= {f"{layer}/MlpBlock_3/{dense}/bias": array(shape[1])}
    np.savez(tmp_path / "augreg.npz", **arrays)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64, num_classes=9
    )
    theirs.load_pretrained(str(tmp_path / "augreg.npz"))
    ours = VisionTransformer(**AS_PRETRAINED).eval()
    report = load_encoder_weights(ours, tmp_path / "augreg.npz")
    assert set(report.dropped) == {"head/kernel", "head/bias"}
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        same(ours(image), theirs.eval().forward_features(image))


def test_convnext_as_its_authors_released_it(tmp_path: Path) -> None:
    truth = drawn(ConvNeXt(**CONVNEXT))
    state = {"norm.weight": torch.ones(24), "head.weight": torch.ones(9, 24)}
    first = [sum(CONVNEXT["depths"][:stage]) + stage for stage in range(4)]  # entry of a stage's first block
    for name, tensor in truth.state_dict().items():
        place, _, part = name.partition(".")
        if place == "embed":
            name = part.replace("conv", "downsample_layers.0.0").replace("norm", "downsample_layers.0.1")
        else:
            number, _, part = part.partition(".")
            stage = max(s for s in range(4) if int(number) >= first[s] - (s > 0))
            block = int(number) - first[stage]
            if block < 0:
                name = f"downsample_layers.{stage}." + part.replace("norm", "0").replace("conv", "1")
            else:
                for ours, theirs in (("mlp.fc", "pwconv"), ("scale.gamma", "gamma")):
                    part = part.replace(ours, theirs)
                name = f"stages.{stage}.{block}.{part}"
        state[name] = tensor
    torch.save({"model": state}, tmp_path / "convnext.pth")
    ours = ConvNeXt(**CONVNEXT).eval()
    assert set(load_encoder_weights(ours, tmp_path / "convnext.pth").dropped) == {
        "norm.weight",
        "head.weight",
    }
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(ours(image).tokens, truth(image).tokens)


def test_a_table_of_another_grid_finds_its_own_when_nothing_says_it() -> None:
    """Square, with a class slot, no config.json: 7x7 to 4x4, in a file of half precision."""
    theirs = drawn(
        timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=112)
    )
    ours = VisionTransformer(**SIZE, position_grid=(4, 4))
    load_encoder_state(ours, {name: tensor.half() for name, tensor in theirs.state_dict().items()})
    table = theirs.pos_embed[:, 1:].half().float().mT.unflatten(2, (7, 7))
    expected = F.interpolate(table, (4, 4), mode="bicubic").flatten(2).mT[0]
    torch.testing.assert_close(ours.position.table, expected, atol=1e-3, rtol=1e-3)
    assert ours.position.table.dtype == torch.float32


@pytest.mark.parametrize("grid", [(2, 8), (4, 4), (1, 16)])
def test_a_square_table_is_read_as_a_square_though_the_encoders_has_as_many_cells(
    grid: tuple[int, int],
) -> None:
    theirs = drawn(timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64))
    ours = VisionTransformer(**SIZE, position_grid=grid)
    report = load_encoder_state(ours, theirs.state_dict())
    assert set(report.resized) == (set() if grid == (4, 4) else {"position.table"})
    table = theirs.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(table, grid, mode="bicubic").flatten(2).mT[0]
    torch.testing.assert_close(ours.position.table, expected)


def test_an_encoder_of_ours_starts_one_of_another_geometry() -> None:
    source = drawn(VisionTransformer(**SIZE, position_grid=(4, 4), class_token=True, class_slot=True))
    ours = VisionTransformer(**SIZE, position_grid=(3, 5), class_token=True, class_slot=True, patch=8)
    report = load_encoder_state(ours, source.state_dict())
    assert set(report.resized) == {"position.table", "patch_embed.proj.weight"}
    assert torch.equal(ours.position.table[0], source.position.table[0])
    alike = VisionTransformer(**SIZE, position_grid=(2, 8))
    source = drawn(VisionTransformer(**SIZE, position_grid=(2, 8)))
    assert not load_encoder_state(alike, source.state_dict()).resized
    assert torch.equal(alike.position.table, source.position.table)


def test_timms_clip_has_its_first_norm() -> None:
    theirs = drawn(
        timm.create_model("vit_base_patch16_clip_224", embed_dim=32, depth=2, num_heads=4, img_size=64)
    )
    ours = VisionTransformer(
        **{**AS_PRETRAINED, "norm_eps": 1e-5, "patch_bias": False, "embed_norm": True}
    ).eval()
    assert load_encoder_state(ours, theirs.state_dict()).ok
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        same(ours(image), theirs.forward_features(image))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": [16]}, r"image_size \[16\], which is no height and width"),
        ({"image_size": "16"}, r"image_size '16', which is no height and width"),
        ({"image_size": -16}, "no height and width"),
        ({"image_size": {"height": 64}}, "no height and width"),
        ({"image_size": {"height": 64, "width": 64}, "vision_config": None, "hidden_act": ["gelu"]}, None),
        ({"image_size": None, "pretrained_cfg": [3], "num_attention_heads": "4"}, None),
    ],
)
def test_a_config_that_says_rubbish_is_refused_in_words(
    change: dict[str, Any], says: str | None, tmp_path: Path
) -> None:
    build, arguments = FAMILIES["vit"]
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    ours = VisionTransformer(**{**AS_PRETRAINED, **arguments})
    if says is None:
        assert load_encoder_weights(ours, tmp_path).ok
    else:
        with pytest.raises(ValueError, match=says):
            load_encoder_weights(ours, tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("patch_embed.proj.weight", torch.zeros(32, 768)),
        ("pos_embed", torch.zeros(17)),
        ("pos_embed", torch.tensor(1.0)),
        ("blocks.0.norm1.weight", torch.zeros(32, dtype=torch.int8)),
        ("blocks.0.norm1.weight", torch.zeros(32, dtype=torch.complex64)),
    ],
)
def test_tensors_of_strange_shapes_and_kinds_do_not_fit(name: str, tensor: Tensor) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64)
    state = theirs.state_dict() | {name: tensor}
    with pytest.raises(FitError, match="these weights does not fit: "):
        load_encoder_state(VisionTransformer(**SIZE, position_grid=(4, 4)), state, image_size=(64, 64))


def test_a_source_that_changes_nothing_is_an_error() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64)
    ours = VisionTransformer(**SIZE, position_grid=(4, 4))
    load_encoder_state(ours, theirs.state_dict())
    with pytest.raises(FitError, match="changed nothing"):
        load_encoder_state(ours, theirs.state_dict())


def test_heads_that_no_tensor_shows_have_to_agree(tmp_path: Path) -> None:
    build, arguments = FAMILIES["vit"]
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"says 4 attention heads, this encoder has 2"):
        load_encoder_weights(VisionTransformer(**{**AS_PRETRAINED, **arguments, "num_heads": 2}), tmp_path)
    report = load_encoder_weights(VisionTransformer(**{**AS_PRETRAINED, "activation": "relu"}), tmp_path)
    assert report.notes == [
        "layer_norm_eps is 1e-12 in config.json and 1e-06 in this encoder",
        "hidden_act is gelu in config.json and relu in this encoder",
    ]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.pth", "model.safetensors"])
def test_every_kind_of_file_is_read_safely(file: str, tmp_path: Path) -> None:
    state = drawn(VisionTransformer(**SIZE, position="none")).state_dict()
    (save_file if file.endswith("safetensors") else torch.save)(dict(state), tmp_path / file)
    for source in (tmp_path, tmp_path / file):
        ours = VisionTransformer(**SIZE, position="none")
        assert load_encoder_weights(ours, source).ok
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('this was run')",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(1), "x": _Evil()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"wants to run .*exec.* refused"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path / "weights.pth")


def test_shards_are_read_together_and_copies_under_other_names_left_alone(tmp_path: Path) -> None:
    state = drawn(VisionTransformer(**SIZE, position="none")).state_dict()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"visual.trunk.a": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    ours = VisionTransformer(**SIZE, position="none")
    load_encoder_weights(ours, tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{ot json")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path)


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_a_hub_name_fetches_safetensors_or_else_what_torch_saved(
    has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = drawn(VisionTransformer(**SIZE, position="none")).state_dict()
    asked = []

    def download(repository: str, patterns: list[str], *, revision: str | None) -> Path:
        asked.append(repository)
        if has_safetensors and "model*.safetensors" in patterns:
            save_file(dict(state), tmp_path / "model.safetensors")
        if "pytorch_model*.bin" in patterns:
            torch.save(dict(state), tmp_path / "pytorch_model.bin")
        return tmp_path

    monkeypatch.setattr(pretrained, "download", download)
    ours = build_encoder("deit_t", weights="timm:some_vit.tag", **SIZE, position="none", layer_scale=None)
    assert asked == ["timm/some_vit.tag"] * (1 if has_safetensors else 2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_what_is_neither_here_nor_a_hub_name_is_refused() -> None:
    for source in ("./nowhere", "/nowhere/at/all", "nowhere"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_encoder_weights(VisionTransformer(**SIZE), source)
    with pytest.raises(HubError, match="owner/name is not on this machine"):
        load_encoder_weights(VisionTransformer(**SIZE), "owner/name")


def test_names_that_nobody_has_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the names of its tensors \(a, \.\.\.\) are none that are known"):
        load_encoder_weights(VisionTransformer(**SIZE), tmp_path)


def test_an_encoder_that_is_no_encoder_of_ours_is_refused() -> None:
    state = {"blocks.0.attn.qkv.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="not known for a Linear"):
        load_encoder_state(nn.Linear(1, 1), state)


def test_names_tell_whose_they_are() -> None:
    assert recognise(VisionTransformer(**SIZE).state_dict()) == "timm_vit"
    assert recognise(["convnext.encoder.stages.0.layers.0.dwconv.weight"]) == "convnext_hf"
    assert recognise(["vision_model.encoder.layers.0.attn.qkv.weight"]) == "internvit_hf"
    assert recognise(["model.layers.0.self_attn.q_proj.weight"]) is None
