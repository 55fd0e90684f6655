"""Encoders equal the official ones where official tensors are at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases_encoders import CASES, check_position_grid, encoder_from_settings
from record import Unsupported, read_record
from stepwell.encoders.convnext import ConvNeXt
from verify import verify

GOLDEN = Path(__file__).parent / "piip"

BRANCH: dict[str, Any] = {
    "block_class": "deit",
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "qkv_bias": True,
    "qk_norm": False,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "layer_scale": False,
    "layer_scale_init": None,
    "window_attn": [True, False],
    "window_size": [3, 0],
    "window_padding": "qkv",
    "use_cls_token": False,
}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("10_load_*.safetensors")), ids=lambda p: p.stem)
def test_tables_and_kernels_are_taken_over_as_the_official_code_does(path: Path) -> None:
    record = read_record(path)
    assert record is not None
    verdict = verify(record)
    assert (verdict.status, verdict.reason) == ("ok", "")


@pytest.mark.parametrize("keep_cls_token", [False, True])
@pytest.mark.parametrize("keep_class_slot", [False, True])
def test_clip_takes_a_table_over_with_or_without_the_slot_of_its_class_token(
    keep_class_slot: bool, keep_cls_token: bool
) -> None:
    """The recorded kernel, and beside it a table that keeps its grid: official code leaves it alone."""
    record = read_record(GOLDEN / "10_load_clip_patch_a.safetensors")
    assert record is not None
    table, token = torch.randn(1 + 6 * 5, 16), torch.randn(16)
    record.inputs["ckpt.embeddings.position_embedding.weight"] = table
    record.inputs["ckpt.embeddings.class_embedding"] = token
    record.outputs["embeddings.position_embedding.weight"] = table if keep_class_slot else table[1:]
    if keep_cls_token:
        record.outputs["embeddings.class_embedding"] = token
    settings = {"keep_class_slot": keep_class_slot, "keep_cls_token": keep_cls_token, "source_grid": [6, 5]}
    ours = CASES[record.kind](replace(record, settings=record.settings | settings))
    assert isinstance(ours, dict)
    assert all(torch.equal(ours[name], stored) for name, stored in record.outputs.items())


def test_settings_reach_every_block() -> None:
    encoder, _ = encoder_from_settings(BRANCH)
    assert [block.attn.window for block in encoder.blocks] == [3, 0]
    assert {block.attn.window_padding for block in encoder.blocks} == {"qkv"}
    assert encoder.blocks[1].norm2.eps == 1e-5
    assert encoder.position is None


def test_a_global_beit_block_has_a_table_for_its_recorded_grid() -> None:
    change = {
        "block_class": "beit",
        "pos_embed_type": "relative",
        "window_size": [3, 5],
        "pos_embed_grid": None,
    }
    encoder, _ = encoder_from_settings({**BRANCH, **change})
    assert [block.attn.window for block in encoder.blocks] == [3, 0]
    assert [block.attn.relative_grid for block in encoder.blocks] == [(3, 3), (5, 5)]


def test_settings_that_are_not_ours_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="rotary"):
        encoder_from_settings({**BRANCH, "pos_embed_type": "rotary"})


def test_a_table_that_is_not_resized_needs_its_own_grid() -> None:
    table = {"pos_embed_resize": "none", "pos_embed_grid": [4, 4], "patch_size": 16}
    check_position_grid(table, (64, 79))
    check_position_grid({**table, "pos_embed_resize": "bicubic"}, (64, 96))
    with pytest.raises(Unsupported, match=r"\[4, 4\] on a grid of \[4, 6\]"):
        check_position_grid(table, (64, 96))
    with pytest.raises(Unsupported, match="pos_embed_resize 'bilinear'"):
        encoder_from_settings({**BRANCH, "pos_embed_resize": "bilinear"})


def test_a_convnext_whose_recorded_strides_differ_is_refused() -> None:
    branch = {
        "block_class": "convnext_hf",
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "stem_kernel": 4,
        "downsample_kernel": 2,
        "kernel_size": 7,
        "mlp_ratio": 4.0,
        "norm": "layernorm",
        "norm_eps": 1e-6,
        "activation": "gelu",
        "layer_scale": True,
        "downsample_ratios": [4, 8, 8],
    }
    encoder, _ = encoder_from_settings(branch)
    assert isinstance(encoder, ConvNeXt)
    assert encoder.stem(torch.randn(1, 3, 16, 24)).size == (4, 6)
    with pytest.raises(ValueError, match=r"strides \(4, 8, 8\), recorded \[4, 8, 16\]"):
        encoder_from_settings({**branch, "downsample_ratios": [4, 8, 16]})
