"""Detection and segmentation equal the recorded official ones, on both paths.

Records are whole, but for that of the whole DINO, which is without its largest outputs; the largest are run
by verify.py alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from record import Unsupported, read_record
from verify import CASES, verify

RECORDED = sorted((Path(__file__).parent / "det").glob("*.safetensors"))


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
        ("28_preprocess_sizes", "pipelines.0.keep_ratio", False),
        ("28_preprocess_sizes", "pipelines.3.pad_value", 114),
        ("28_preprocess_images", "pipelines.0.to_rgb", False),
        ("28_preprocess_images", "content", "boxes"),
        ("29_upernet_eval", "decode_head.norm_eps", 1e-3),
        ("29_upernet_eval", "decode_head.align_corners", True),
        ("29_upernet_eval", "decode_head.in_index", [0, 1, 3, 2]),
        ("29_upernet_eval", "decode_head.loss.weight", 2.0),
        ("29_upernet_eval", "auxiliary_head.num_convs", 2),
        ("29_upernet_eval", "auxiliary_head.kernel_size", 1),
        ("29_upernet_eval", "auxiliary_head.dropout_ratio", 0.5),
        ("29_upernet_train", "auxiliary_head.loss.average_over", "pixels that are kept"),
        ("29_upernet_train", "auxiliary_head.loss.ignore_index", 0),
        ("31_seg_preprocess", "pipelines.0.padding", 32),
        ("31_seg_preprocess", "pipelines.0.rule", "both limits"),
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
    record = read_record(next(recorded for recorded in RECORDED if recorded.name.startswith(file)))
    *parents, key = path.split(".")
    place = record.settings
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    assert key in place
    place[key] = value
    with pytest.raises(Unsupported, match=rf"^{re.escape(path)} "):
        CASES[record.kind](record)
