"""Two-stage detection's parts equal the recorded official ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_rcnn
from record import Record, Unsupported, read_record
from verify import verify

RECORDED = sorted(
    file
    for file in (Path(__file__).parent / "det").glob("*.safetensors")
    if file.name.startswith(("20", "21", "22", "23", "24", "25"))
)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert verdict.status == "ok", verdict.reason


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("20_box_coder", "coders.2.clip_border", False),
        ("21_fpn", "upsample", "bilinear"),
        ("22_rpn", "rpn.num_convs", 2),
        ("22_rpn", "rpn.loss_cls.type", "focal"),
        ("22_rpn", "rpn_train.assigner.ignore_iof_thr", 0.5),
        ("22_rpn", "rpn_train.sampler.add_gt_as_proposals", True),
        ("23_roi", "roi_extractor.pool_mode", "max"),
        ("24_bbox", "bbox_head.type", "conv_fc"),
        ("24_bbox", "train.pos_weight", 2.0),
        ("25_mask", "mask_head.class_agnostic", True),
    ],
)
def test_settings_that_are_not_ours_are_named(file, path, value):
    record = read_record(next(f for f in RECORDED if f.name.startswith(file)))
    *parents, key = path.split(".")
    place = record.settings
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    assert key in place
    place[key] = value
    with pytest.raises(Unsupported, match=rf"^{path} "):
        cases_rcnn.CASES[record.kind](record)


def test_stages_of_a_cascade_are_looked_at_one_by_one():
    heads = [{"type": "shared_2fc"}, {"type": "convs"}]
    settings = {"roi_head": {"bbox_head": heads}}
    record = Record(path=Path(), system="piip", kind="det.cascade", case="", version="", settings=settings)
    with pytest.raises(Unsupported, match=r"roi_head.bbox_head.1.type 'convs'"):
        cases_rcnn.CASES[record.kind](record)
