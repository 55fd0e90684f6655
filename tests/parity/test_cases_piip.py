"""PIIP's parts equal the recorded official ones, on both paths, through the key tables of conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_piip
from record import Record, Unsupported, read_record
from verify import verify

RECORDED = sorted(
    file
    for file in (Path(__file__).parent / "piip").glob("*.safetensors")
    if file.name.startswith(("01", "02", "03", "09"))
)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert verdict.status == "ok", verdict.reason


def test_an_order_of_units_that_was_not_recorded_is_unsupported():
    record = read_record(next(file for file in RECORDED if "03_block3" in file.name))
    record.settings["unit_order"] = ["12", "23"]
    with pytest.raises(Unsupported, match="12"):
        cases_piip.CASES["piip.interaction_block"](record)


def named(name):
    return read_record(next(file for file in RECORDED if name in file.name))


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("02_unit", "interaction.n_levels", 2),
        ("02_unit", "interaction.activation", "relu"),
        ("02_unit", "exchange", "one after the other"),
        ("09_projector_gn", "combine", "cat"),
        ("09_projector_gn", "resize", "nearest"),
        ("09_projector_gn", "resize_before_linear", False),
        ("09_projector_gn", "linear_indexes", [1, 5]),
        ("09_projector_gn", "norm_affine", False),
        ("09_projector_gn", "activation", "relu"),
        ("09_llava_preprocess", "resample", "bilinear"),
        ("09_llava_preprocess", "rescale_factor", 1.0),
        ("09_llava_preprocess", "pad.canvas_rgb", [0, 0, 0]),
    ],
)
def test_settings_that_are_not_ours_are_named(file, path, value):
    record = named(file)
    *parents, key = path.split(".")
    place = record.settings
    for parent in parents:
        place = place[parent]
    assert key in place
    place[key] = value
    with pytest.raises(Unsupported, match=rf"^{path} "):
        cases_piip.CASES[record.kind](record)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("piip.backbone", {"merge": {"sum_weights": "softmax"}}, "merge.sum_weights 'softmax'"),
        ("piip.backbone", {"merge": {"resize": "nearest"}}, "merge.resize 'nearest'"),
        ("piip.backbone", {"grid_rule": "ceil"}, "grid_rule 'ceil'"),
        ("piip.classifier", {"class_token_in_exchange": True}, "class_token_in_exchange True"),
        ("piip.classifier", {"head": {"combine": "max"}}, "head.combine 'max'"),
        ("piip.classifier", {"head": {"token_index": 1}}, "head.token_index 1"),
        ("piip.classifier", {"head": {"pool": "max"}}, "head.pool 'max'"),
        ("piip.llava_tower", {"projector": {"combine": "cat"}}, "projector.combine 'cat'"),
    ],
)
def test_settings_of_whole_models_are_looked_at_first(kind, settings, words):
    record = Record(path=Path(), system="piip", kind=kind, case="", version="", settings=settings)
    with pytest.raises(Unsupported, match=words):
        cases_piip.CASES[kind](record)


def test_a_tower_whose_ratios_are_not_those_of_its_sides_is_unsupported():
    settings = {
        "branches": [{"img_size": 64}, {"img_size": 96}],
        "image_ratios": [0.5, 1.0],
        "projector": {"norm": "groupnorm"},
    }
    record = Record(
        path=Path(), system="piip", kind="piip.llava_tower", case="", version="", settings=settings
    )
    with pytest.raises(Unsupported, match=r"image_ratios \[0.5, 1.0\]"):
        cases_piip.CASES[record.kind](record)
