"""Segmentation and images for detection equal the recorded official ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cases_upernet import CASES
from record import Unsupported, read_record
from stepwell.keys.upernet import UPERNET
from verify import verify

FOLDER = Path(__file__).parent / "det"
RECORDED = sorted(file for file in FOLDER.glob("*.safetensors") if file.name[:2] in ("28", "29", "31"))


def named(name):
    return read_record(next(file for file in RECORDED if name in file.name))


def test_a_table_of_sizes_is_checked_row_by_row(tmp_path):
    sizes = named("28_preprocess_sizes")
    names = ("resized", "padded", "scale_factor", "boxes_resized", "boxes_back")
    pipeline = sizes.settings["pipelines"][1]
    rows = [
        {
            **{key: pipeline[key] for key in ("img_scale", "size_divisor")},
            "original": sizes.inputs["sizes"][i].tolist(),
            "boxes": sizes.inputs["boxes"][i].tolist(),
            **{name: sizes.outputs[f"{name}1"][i].tolist() for name in names},
        }
        for i in range(3)
    ]
    path = tmp_path / "sizes.json"
    for changed in (None, *names):
        if changed:
            rows[2][changed] = (torch.tensor(rows[2][changed]) + 1).tolist()
        path.write_text(json.dumps({"kind": "det.preprocess", "rows": rows}))
        verdict = verify(read_record(path))
        assert verdict.status == ("FAILED" if changed else "ok")
    assert verify(read_record(path)).reason.startswith("reference path: row 2: resized")


def test_windows_slide_as_settings_say():
    """The recorded files of the sliding window are large: here our own logits stand for them."""
    record = named("29_upernet_eval")
    head = record.settings["decode_head"]
    changes = {
        "content": "slide",
        "stub_backbone": {"channels": head["in_channels"], "strides": [4, 8, 16, 32]},
        "test": {"mode": "slide", "crop_size": [64, 64], "stride": [43, 43]},
        "img_shape": [48, 100],
        "ori_shape": [61, 127],
    }
    record.settings.update(changes)
    record.inputs["image"] = torch.randn(1, 3, 48, 100)
    for i, dim in enumerate(head["in_channels"]):
        record.params[f"backbone.convs.{i}.weight"] = torch.randn(dim, 3, 4 * 2**i, 4 * 2**i)
        record.params[f"backbone.convs.{i}.bias"] = torch.zeros(dim)
    outputs = CASES["seg.upernet"](record)
    assert outputs["num_crops"] == 2
    assert outputs["crop0_logits"].shape[-2:] == (48, 64)
    torch.testing.assert_close(
        outputs["logits"][..., :36], outputs["crop0_logits"][..., :36], rtol=1e-3, atol=1e-3
    )
    assert torch.equal(outputs["prediction"], outputs["probabilities"].argmax(1))
    record.settings["mode"] = "train"
    with pytest.raises(Unsupported, match="mode 'train' of content 'slide'"):
        CASES["seg.upernet"](record)


def test_every_recorded_parameter_of_a_head_has_a_place():
    record = named("29_upernet_train")
    assert len(record.converted(UPERNET)) == len(record.params)
