"""MMSegmentation's names of UperNet and where they end up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepwell.heads.upernet import UperNetConfig
from stepwell.keys.engine import plan
from stepwell.keys.upernet import UPERNET

LAYOUT = Path(__file__).parents[1] / "parity" / "det" / "layout_upernet_heads_in3200.json"


def test_every_tensor_of_a_released_head_has_one_place_of_its_shape():
    theirs = json.loads(LAYOUT.read_text())["keys"]
    with torch.device("meta"):
        config = UperNetConfig(channels=1536, auxiliary_channels=1536)
        ours = config.build([3200] * 4, [4, 8, 16, 32], 150).state_dict()
    result = plan(theirs, UPERNET)
    assert (result.unknown, result.dropped) == ([], {})
    assert result.targets.keys() == ours.keys()
    for name, target in result.targets.items():
        (source,) = target.sources
        assert list(ours[name].shape) == theirs[source], name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("decode_head.psp_modules.2.1.conv.weight", "pools.2.conv.weight"),
        ("decode_head.psp_modules.2.1.bn.running_var", "pools.2.norm.running_var"),
        ("decode_head.bottleneck.bn.bias", "context.norm.bias"),
        ("decode_head.fpn_convs.11.bn.num_batches_tracked", "smooth.11.norm.num_batches_tracked"),
        ("decode_head.fpn_bottleneck.conv.weight", "join.conv.weight"),
        ("auxiliary_head.convs.0.bn.weight", "auxiliary.conv.norm.weight"),
        ("auxiliary_head.conv_seg.bias", "auxiliary.classifier.bias"),
    ],
)
def test_names(theirs, ours):
    assert list(plan([theirs], UPERNET).targets) == [ours]


@pytest.mark.parametrize("name", ["auxiliary_head.convs.1.conv.weight", "decode_head.bottleneck.conv.bias"])
def test_other_names_are_unknown(name):
    assert plan([name], UPERNET).unknown == [name]
