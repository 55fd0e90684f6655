"""Encoders against recorded official tensors: single branches, and what loading does to tables and kernels.

`encoder_from_settings` turns the branch object of a PIIP record into an encoder and its key table; cases of
whole pyramids use it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from record import Case, Record, Unsupported, check_required
from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.table_fit import TableFit
from stepwell.encoders.vit import Position, VisionTransformer
from stepwell.keys.backbones import Naming, backbone_rules
from stepwell.keys.engine import Rule, convert
from stepwell.structures import TokenMap

__all__ = ["CASES", "check_position_grid", "encoder_from_settings"]


def encoder_from_settings(branch: Mapping[str, Any]) -> tuple[VisionTransformer | ConvNeXt, list[Rule]]:
    """A branch object of a record -> our encoder with random weights, and the rules for its official names.

    A final norm is the head's affair, so none is built. Raises Unsupported for settings we do not have.
    """
    naming: Naming = branch["block_class"]
    if naming in ("convnext_hf", "convnext_timm"):
        return _convnext(branch), backbone_rules(naming, depths=branch["depths"])
    encoder = _vit(branch)
    rules = backbone_rules(
        naming,
        class_token=branch["use_cls_token"],
        class_slot=encoder.class_slot,
        grid=encoder.position_grid,
    )
    return encoder, rules


def _vit(branch: Mapping[str, Any]) -> VisionTransformer:
    """Bare blocks (no embedding recorded) get an encoder without positions, whose stem goes unused."""
    check_required(
        branch, {"pos_embed_resize": ("bicubic", "none", None), "temporal_row_used": (0, None)}, "branch "
    )
    windows = [w if on else 0 for on, w in zip(branch["window_attn"], branch["window_size"], strict=True)]
    kind = branch.get("pos_embed_type")
    grid = branch.get("pos_embed_grid")
    position: dict[str | None, Position] = {
        "table": "table",
        "spatial_and_temporal": "table",
        "relative": "relative",
        None: "none",
    }
    if kind not in position:
        raise Unsupported(f"positions {kind!r}")
    if kind == "relative":  # a global BEiT block has a table for one grid, its "window"
        tables = {w for on, w in zip(branch["window_attn"], branch["window_size"], strict=True) if not on}
        if len(tables) > 1:
            raise Unsupported(f"global blocks with tables for different grids: {sorted(tables)}")
        grid = [tables.pop()] * 2 if tables else None
    hidden = branch.get("intermediate_size") or int(branch["embed_dim"] * branch["mlp_ratio"])
    return VisionTransformer(
        dim=branch["embed_dim"],
        depth=branch["depth"],
        num_heads=branch["num_heads"],
        mlp_ratio=(hidden + 0.5) / branch["embed_dim"],  # the half survives rounding down
        patch=branch.get("patch_size", 16),
        patch_bias=branch.get("patch_bias", True),
        qkv_bias=branch["qkv_bias"],
        qk_norm=branch["qk_norm"],
        norm=branch["norm"],
        norm_eps=branch["norm_eps"],
        activation=branch["activation"],
        layer_scale=(branch.get("layer_scale_init") or 0.0) if branch["layer_scale"] else None,
        windows=windows,
        window_padding=branch["window_padding"] or "tokens",
        position=position[kind],
        position_grid=tuple(grid) if grid else (14, 14),
        temporal_rows=branch.get("temporal_rows") or 0,
        class_token=branch["use_cls_token"],
        class_slot=bool(branch.get("pos_embed_class_slot_added")),
        embed_norm=bool(branch.get("pre_norm") or branch.get("embed_norm")),
    )


def _convnext(branch: Mapping[str, Any]) -> ConvNeXt:
    if branch["norm"] != "layernorm":
        raise Unsupported(f"ConvNeXt with {branch['norm']}")
    dims = branch["hidden_sizes"]
    encoder = ConvNeXt(
        dims=dims,
        depths=branch["depths"],
        strides=[branch["stem_kernel"]] + [branch["downsample_kernel"]] * (len(dims) - 1),
        stem_kernel=branch["stem_kernel"],
        kernel_size=branch["kernel_size"],
        mlp_ratio=branch["mlp_ratio"],
        norm_eps=branch["norm_eps"],
        activation=branch["activation"],
        layer_scale=1e-6 if branch["layer_scale"] else None,
    )
    if encoder.spec.strides != tuple(branch["downsample_ratios"]):
        raise ValueError(f"strides {encoder.spec.strides}, recorded {branch['downsample_ratios']}")
    return encoder


def _output(encoder: VisionTransformer | ConvNeXt, state: TokenMap, layout: str) -> Tensor:
    check_required({"output_layout": layout}, {"output_layout": ("map", "tokens")})
    return encoder.to_map(state) if layout == "map" else state.tokens


def check_position_grid(branch: Mapping[str, Any], image: Sequence[int]) -> None:
    """Raises Unsupported where a table that is not resized meets another grid: official code fails there."""
    table = branch.get("pos_embed_grid")
    if branch.get("pos_embed_resize") != "none" or not table:
        return
    grid = [side // branch["patch_size"] for side in image]
    if list(table) != grid:
        raise Unsupported(f"pos_embed_resize 'none' with a table for {table} on a grid of {grid}")


def _vit_branch(record: Record) -> dict[str, Tensor]:
    """The state after the embedding and after every block."""
    settings = record.settings
    check_position_grid(settings, settings["image_size"])
    encoder, rules = encoder_from_settings(settings)
    record.load_into(encoder, rules)
    state = encoder.stem(record.inputs["image"])
    states = {"embed": state}
    for i in range(encoder.spec.depth):
        state = encoder.run(state, i, i)
        states[f"layer{i}"] = state
    return {name: _output(encoder, states[name], settings["output_layout"]) for name in settings["outputs"]}


def _convnext_branch(record: Record) -> dict[str, Tensor]:
    """The state after the stem and after every group of layers."""
    settings = record.settings
    encoder, rules = encoder_from_settings(settings)
    record.load_into(encoder, rules)
    state = encoder.stem(record.inputs["image"])
    states = {"embed": state}
    for i, (first, last) in enumerate(settings["interaction_indexes"]):
        state = encoder.run(state, first, last)
        if list(state.size) != settings["group_grids"][i]:
            raise ValueError(f"grid {state.size} after group {i}, recorded {settings['group_grids'][i]}")
        states[f"group{i}"] = state
    return {name: _output(encoder, states[name], settings["output_layout"]) for name in settings["outputs"]}


def _convnext_stages(record: Record) -> dict[str, Tensor]:
    """The map after every stage."""
    encoder, rules = encoder_from_settings(record.settings)
    assert isinstance(encoder, ConvNeXt)
    record.load_into(encoder, rules)
    state, first, outputs = encoder.stem(record.inputs["image"]), 0, {}
    for stage, depth in enumerate(encoder.depths, start=1):
        last = first + depth - (stage == 1)  # all stages but the first begin with a downsampling layer
        state = encoder.run(state, first, last)
        first = last + 1
        outputs[f"stage{stage}"] = _output(encoder, state, record.settings["output_layout"])
    return outputs


def _load_position_and_patch(record: Record) -> dict[str, Tensor]:
    """A checkpoint's tables and kernels: renamed, fitted, and back under their official names."""
    settings = record.settings
    state = {name.removeprefix("ckpt."): tensor for name, tensor in record.inputs.items()}
    naming: Naming = settings["block_class"]
    if naming in ("deit", "internvit"):  # what PIIP loads is a release, under timm's names
        naming = "timm_vit"
    class_slot = bool(settings.get("keep_class_slot"))
    window = settings.get("source_window")
    source_grid = tuple([window, window] if window else settings.get("source_grid", [14, 14]))
    rules = backbone_rules(
        naming,
        class_token=bool(settings.get("keep_cls_token")),
        class_slot=class_slot,
        grid=source_grid,
        depth=settings.get("depth", 0),
    )
    fit = TableFit(
        patch=settings.get("patch_size", 16),
        source_grid=source_grid,
        position_grid=tuple(settings.get("target_grid", source_grid)),
        class_slot=class_slot,
        windows=settings.get("window_size", ()),
    )
    ours = {name: fit(name, tensor) for name, tensor in convert(state, rules).items()}
    return {name: ours[_ours(name)].reshape(stored.shape) for name, stored in record.outputs.items()}


def _ours(name: str) -> str:
    """The official name of a tensor that loading changes -> ours."""
    names = {
        "pos_embed": "position.table",
        "cls_token": "class_token",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.position_embedding.weight": "position.table",
        "embeddings.class_embedding": "class_token",
    }
    return names.get(name, name.replace("relative_position_bias_table", "relative_table"))


CASES: dict[str, Case] = {
    "piip.vit_branch": _vit_branch,
    "piip.convnext_branch": _convnext_branch,
    "piip.convnext_stages": _convnext_stages,
    "piip.load_position_and_patch": _load_position_and_patch,
}
