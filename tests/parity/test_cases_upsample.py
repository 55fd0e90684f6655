"""The inverse pyramid equals the recorded one, on both paths, through the key tables of conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from cases_upsample import CASES
from record import Unsupported, read_record
from verify import verify

RECORDED = sorted((Path(__file__).parent / "uhd").glob("jbu_*.safetensors"))


def named(name):
    return read_record(next(file for file in RECORDED if file.stem == name))


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert verdict.status == "ok", verdict.reason


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("jbu_single", "temperature_clamp", [1e-3, 1e4]),
        ("jbu_single", "kernel_sum_clamp", 1e-6),
        ("jbu_single", "kernel_fixup_weight", 0.2),
        ("jbu_single", "spatial_coordinates", "pixels"),
        ("jbu_single", "source_upsample", "bilinear"),
        ("jbu_single", "border", "zeros"),
        ("jbu_single", "activation", "relu"),
        ("jbu_single", "guidance_at_output_size", False),
        ("jbu_stack_8x", "border", "zeros"),
        ("jbu_stack_8x", "scale", 16),
        ("jbu_stack_8x", "stage_scale", 4),
        ("jbu_stack_8x", "shared_stages", True),
        ("jbu_stack_8x", "guidance_pool", "bilinear"),
        ("jbu_stack_8x", "fixup_weight", 1.0),
        ("jbu_stack_8x", "final_fixup", None),
        ("jbu_stack_8x", "internal_feeds_next_stage", False),
    ],
)
def test_settings_that_are_not_ours_are_named(file, key, value):
    record = named(file)
    assert key in record.settings
    record.settings[key] = value
    with pytest.raises(Unsupported, match=rf"^{key} "):
        CASES[record.kind](record)


def test_a_map_corrected_by_another_layer_is_unsupported():
    record = named("jbu_stack_8x")
    record.settings["internal"][0]["fixup"] = "fixup_proj_8x"
    with pytest.raises(Unsupported, match="internal: stage 1 of 3 corrected by fixup_proj_8x"):
        CASES[record.kind](record)
