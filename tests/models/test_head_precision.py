"""Heads compute in the precision of their parameters, whatever autocast says."""

from __future__ import annotations

import pytest
import torch

import stepwell
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig

SMALL = {"dim": 16, "rpn": {"dim": 16}, "box": {"dim": 16}, "mask": {"dim": 16}}


def seen(model, call):
    """The precisions in which the head's linear layers and convolutions give what they give."""
    found = set()
    for module in model.head.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: found.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call()
    return found


@pytest.mark.parametrize("learns", [True, False])
def test_a_detector(learns):
    model = stepwell.StepwellForObjectDetection(StepwellDetectorConfig(head={"kind": "rcnn", **SMALL})).train(
        learns
    )
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    labels[0]["masks"] = torch.ones(1, 64, 64)
    pixels = torch.rand(1, 3, 64, 64)
    assert seen(model, lambda: model(pixels, labels=labels if learns else None)) == {torch.float32}


@pytest.mark.parametrize("learns", [True, False])
def test_a_segmenter(learns):
    head = {"channels": 16, "auxiliary_channels": 16}
    model = stepwell.StepwellForSemanticSegmentation(StepwellSegmenterConfig(head=head)).train(learns)
    pixels, labels = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    assert seen(model, lambda: model(pixels, labels=labels if learns else None)) == {torch.float32}
