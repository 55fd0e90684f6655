"""DINO's parts and the whole head equal the recorded official ones, on both paths.

The record of the whole is without its largest outputs, so that it stays small.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_dino
from record import Unsupported, read_record
from verify import verify

RECORDED = sorted(
    file
    for file in (Path(__file__).parent / "det").glob("*.safetensors")
    if file.name.startswith(("32_", "33_", "34_", "35_"))
)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert verdict.status == "ok", verdict.reason


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("32_channel", "conv_bias", True),
        ("32_channel", "activation", "relu"),
        ("33_dino", "denoising.inverse_sigmoid_eps", 1e-5),
        ("34_dino", "matcher.cls_cost.type", "softmax"),
        ("34_dino", "losses.loss_iou.type", "diou"),
        ("34_dino", "head_for_losses.test.nms", 0.5),
        ("35_dino", "head.norm_eps", 1e-6),
        ("35_dino", "head.positional_encoding.order", "x, y"),
        ("35_dino", "head.two_stage.valid_range", [0.05, 0.95]),
        ("35_dino", "head.box_refine", "look forward once"),
        ("35_dino", "neck.norm", "none"),
    ],
)
def test_settings_that_are_not_ours_are_named(file, path, value):
    record = read_record(next(f for f in RECORDED if f.name.startswith(file)))
    *parents, key = path.split(".")
    place = record.settings
    for parent in parents:
        place = place[parent]
    assert key in place
    place[key] = value
    with pytest.raises(Unsupported, match=rf"^{path} "):
        cases_dino.CASES[record.kind](record)


@pytest.mark.parametrize(("part", "key"), [("neck", "num_outs"), ("neck", "out_channels")])
def test_a_neck_that_does_not_fit_the_head_is_unsupported(part, key):
    record = read_record(RECORDED[-1])
    record.settings[part][key] += 1
    with pytest.raises(Unsupported):
        cases_dino.CASES["det.dino"](record)
