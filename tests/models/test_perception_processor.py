"""Images for segmenters, and the class of every pixel of the originals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stepwell.models.perception_processor import StepwellSegmentationImageProcessor
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD
from stepwell.views.resize import prepare_image


def image(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_short_side_is_resized_and_one_image_is_not_padded():
    processor = StepwellSegmentationImageProcessor(short_side=32)
    picture = image(20, 50)
    batch = processor(picture)
    assert torch.equal(
        batch["pixel_values"][0], prepare_image(picture, (32, 80), IMAGENET_MEAN, IMAGENET_STD)
    )
    assert batch["pixel_mask"].all()
    both = processor([picture, image(45, 30)])
    assert both["pixel_values"].shape == (2, 3, 48, 80)
    assert both["pixel_mask"].sum((1, 2)).tolist() == [32 * 80, 48 * 32]


def test_settings_are_saved(tmp_path):
    processor = StepwellSegmentationImageProcessor(short_side=40, size_divisor=16)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["short_side"], saved["size_divisor"]) == (40, 16)
    again = StepwellSegmentationImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert again(image(20, 21))["pixel_values"].shape == (1, 3, 48, 48)
    assert StepwellSegmentationImageProcessor().prepared_size((600, 450)) == (683, 512)
    with pytest.raises(ValueError, match="short_side is a whole number of at least 1"):
        StepwellSegmentationImageProcessor(short_side=0)


def test_classes_are_those_of_the_logits_at_the_original_size():
    processor, logits = StepwellSegmentationImageProcessor(), torch.randn(2, 5, 12, 16)
    sizes = [(7, 9), (30, 20)]
    for target_sizes in (sizes, torch.tensor(sizes)):
        maps = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), target_sizes)
        for i, size in enumerate(sizes):
            expected = F.interpolate(logits[i : i + 1], size, mode="bilinear").argmax(1)[0]
            assert torch.equal(maps[i], expected)
    maps = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits))
    assert torch.equal(torch.stack(maps), logits.argmax(1))


def test_padding_is_cut_away_before_logits_are_resized():
    processor, logits = StepwellSegmentationImageProcessor(), torch.randn(2, 5, 12, 16)
    outputs = SimpleNamespace(logits=logits, image_sizes=torch.tensor([[12, 10], [5, 16]]))
    first, second = processor.post_process_semantic_segmentation(outputs, [(24, 20), (5, 16)])
    assert torch.equal(first, F.interpolate(logits[:1, :, :, :10], (24, 20), mode="bilinear").argmax(1)[0])
    assert torch.equal(second, logits[1, :, :5].argmax(0))
    assert processor.post_process_semantic_segmentation(outputs)[0].shape == (12, 10)


def test_another_number_of_sizes_is_refused():
    with pytest.raises(ValueError, match="target_sizes has 2 sizes for 1 images"):
        StepwellSegmentationImageProcessor().post_process_semantic_segmentation(
            SimpleNamespace(logits=torch.zeros(1, 2, 3, 3)), [(1, 1)] * 2
        )
