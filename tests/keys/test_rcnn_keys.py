"""Released two-stage detectors have a place for every tensor, and it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepwell.heads.cascade import MMDET_CASCADE, CascadeConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.keys.engine import plan
from stepwell.keys.rcnn import cascade_rules, rcnn_rules

LAYOUTS = Path(__file__).parent / "layouts"
WIDTHS = {"768": [768] * 4, "1024": [1024] * 4, "3200": [3200] * 4, "128_256_512_1024": [128, 256, 512, 1024]}


def shapes(name):
    return json.loads((LAYOUTS / f"{name}.json").read_text())["keys"]


def places(recorded, rules, head):
    """Ours -> theirs, and the shapes of ours."""
    renaming = plan(recorded, rules)
    assert not renaming.unknown
    ours = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    made = {name: recorded[source] for name, target in renaming.targets.items() for source in target.sources}
    assert len(made) == len(recorded)
    return made, ours


@pytest.mark.parametrize("width", WIDTHS)
def test_mask_rcnn(width):
    with torch.device("meta"):
        head = RcnnConfig().build(WIDTHS[width], [4, 8, 16, 32], 80)
    made, ours = places(shapes(f"piip_det_maskrcnn_heads_in{width}"), rcnn_rules(), head)
    assert made == ours


def test_cascade_of_mmdetection():
    with torch.device("meta"):
        head = MMDET_CASCADE.build([1024] * 4, [4, 8, 16, 32], 80)
    made, ours = places(shapes("layout_cascade_mask_rcnn_heads_in1024"), cascade_rules(3), head)
    assert made == ours


def test_faster_rcnn_is_what_is_left_without_masks():
    recorded = {k: v for k, v in shapes("piip_det_maskrcnn_heads_in768").items() if "mask_head" not in k}
    with torch.device("meta"):
        head = RcnnConfig(masks=False).build([768] * 4, [4, 8, 16, 32], 80)
    made, ours = places(recorded, rcnn_rules(), head)
    assert made == ours


def test_convolutions_and_norms_of_vit_adapters_cascade_have_a_place():
    theirs = {
        "roi_head.bbox_head.2.shared_convs.3.conv.weight": [256, 256, 3, 3],
        "roi_head.bbox_head.2.shared_convs.3.bn.running_var": [256],
        "roi_head.bbox_head.0.shared_fcs.0.weight": [1024, 256 * 7 * 7],
        "roi_head.bbox_head.0.fc_reg.weight": [320, 1024],
    }
    with torch.device("meta"):
        head = CascadeConfig().build([768] * 4, [4, 8, 16, 32], 80)
    made, ours = places(theirs, cascade_rules(3), head)
    assert made.items() <= ours.items()
