"""Images for detectors, and boxes and masks of what was found in the originals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.models.detection_processor import StepwellDetectionImageProcessor
from stepwell.structures import HALF_MEAN, HALF_STD
from stepwell.views.resize import prepare_image

SMALL = {"long_limit": 72, "short_limit": 44, "size_divisor": 32}


def image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_batch_has_zeros_and_a_mask_around_images_of_unequal_sizes(tmp_path):
    processor = StepwellDetectionImageProcessor(**SMALL, image_mean=HALF_MEAN, image_std=HALF_STD)
    pictures = [image(60, 90), image(33, 21)]
    pictures[1].save(tmp_path / "tall.png")
    batch = processor([[pictures[0]], str(tmp_path / "tall.png")], return_tensors="pt")
    assert isinstance(batch, BatchFeature)
    assert set(batch) == {"pixel_values", "pixel_mask"}
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    assert batch["pixel_mask"].dtype == torch.int64
    for i, (picture, (rows, cols)) in enumerate(zip(pictures, [(44, 66), (69, 44)], strict=True)):
        expected = prepare_image(picture, (rows, cols), HALF_MEAN, HALF_STD)
        assert torch.equal(batch["pixel_values"][i, :, :rows, :cols], expected)
        assert batch["pixel_mask"][i, :rows, :cols].all()
        assert batch["pixel_mask"][i].sum() == rows * cols
        assert batch["pixel_values"][i][:, batch["pixel_mask"][i] == 0].abs().sum() == 0
    alone = processor(pictures[0])
    assert alone["pixel_values"].shape == (1, 3, 64, 96)


def test_defaults_are_those_of_the_base_configuration():
    processor = StepwellDetectionImageProcessor()
    assert processor.prepared_size((480, 640)) == (800, 1067)
    assert processor.size_divisor == 32
    assert processor.image_mean == [0.485, 0.456, 0.406]


def test_settings_are_saved_and_limits_are_not(tmp_path):
    limits = ImageLimits(max_side=50)
    processor = StepwellDetectionImageProcessor(**SMALL, image_mean=HALF_MEAN, limits=limits)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        **SMALL,
        "image_mean": [0.5] * 3,
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "StepwellDetectionImageProcessor",
    }
    again = StepwellDetectionImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert again(image(60, 90))["pixel_values"].shape == (1, 3, 64, 96)
    changed = StepwellDetectionImageProcessor.from_pretrained(tmp_path, size_divisor=1, limits=limits)
    assert changed(image(30, 45))["pixel_values"].shape == (1, 3, 44, 66)
    file = tmp_path / "wide.png"
    image(60, 90).save(file)
    assert again(file)["pixel_values"].shape == (1, 3, 64, 96)
    with pytest.raises(ImageError, match="max_side=90"):
        changed(file)
    with pytest.raises(ImageError, match="max_side=90"):
        again(file, limits=limits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_limt": 3}, "knows no 'short_limt'"),
        ({"long_limit": 0}, "long_limit is a whole number of at least 1, got 0"),
        ({"size_divisor": 2.5}, "size_divisor is a whole number"),
        ({"long_limit": 800, "short_limit": 1333}, "short_limit 1333 is above long_limit 800"),
        ({"image_mean": (123.7, 116.3, 103.5)}, "image_mean is of red, green and blue in 0..1"),
        ({"image_std": (0, 0.5, 0.5)}, "image_std is of red, green and blue"),
        ({"image_std": (0.5,)}, "image_std is of red, green and blue"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StepwellDetectionImageProcessor(**settings)


def test_unknown_keywords_are_refused(tmp_path):
    processor = StepwellDetectionImageProcessor()
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows no 'annotations'"):
        processor(image(4, 4), annotations=[])
    with pytest.raises(ValueError, match="knows no 'sise_divisor'"):
        StepwellDetectionImageProcessor.from_pretrained(tmp_path, sise_divisor=3)
    with pytest.raises(ValueError, match="was given no image"):
        processor([])


def outputs(dtype=torch.float32):
    boxes = torch.tensor(
        [[[0, 0, 0.5, 0.5], [0.5, 0, 1, 1], [0, 0, 1, 1]], [[0.25, 0.5, 0.75, 1]] + [[0] * 4] * 2]
    )
    return SimpleNamespace(
        pred_boxes=boxes.to(dtype),
        scores=torch.tensor([[0.9, 0.5, 0.3], [0.8, 0, 0.9]], dtype=dtype),
        labels=torch.tensor([[3, 0, 1], [2, -1, -1]]),
        pred_masks=torch.ones(2, 3, 28, 28, dtype=dtype),
    )


def test_boxes_above_the_threshold_are_in_pixels_of_the_originals():
    processor = StepwellDetectionImageProcessor()
    sizes = [(100, 200), (40, 20)]
    for target_sizes in (sizes, torch.IntTensor(sizes)):
        first, second = processor.post_process_object_detection(outputs(), 0.3, target_sizes)
        assert first["boxes"].tolist() == [[0, 0, 100, 50], [100, 0, 200, 100]]
        assert first["labels"].tolist() == [3, 0]
        assert second["boxes"].tolist() == [[5, 20, 15, 40]]
        assert second["labels"].tolist() == [2]
        torch.testing.assert_close(second["scores"], torch.tensor([0.8]))


def test_without_sizes_boxes_stay_shares_of_the_image():
    processor = StepwellDetectionImageProcessor()
    first, second = processor.post_process_object_detection(outputs(torch.bfloat16))
    assert first["boxes"].tolist() == [[0, 0, 0.5, 0.5]]
    assert first["boxes"].dtype == first["scores"].dtype == torch.float32
    assert second["boxes"].tolist() == [[0.25, 0.5, 0.75, 1]]


def test_another_number_of_sizes_is_refused():
    with pytest.raises(ValueError, match="target_sizes has 1 sizes for 2 images"):
        StepwellDetectionImageProcessor().post_process_object_detection(outputs(), 0.5, [(1, 1)])


def test_instances_are_maps_of_the_originals():
    processor, sizes = StepwellDetectionImageProcessor(), [(4, 8), (4, 4)]
    segment = processor.post_process_instance_segmentation
    first, second = segment(
        outputs(torch.bfloat16), threshold=0.2, overlap_mask_area_threshold=0.1, target_sizes=sizes
    )
    assert first["segmentation"].tolist() == [[0] * 4 + [1] * 4] * 2 + [[2] * 4 + [1] * 4] * 2
    assert [segment["label_id"] for segment in first["segments_info"]] == [3, 0, 1]
    assert second["segmentation"].tolist() == [[-1] * 4] * 2 + [[-1, 0, 0, -1]] * 2
    (alone,), _ = (
        one["segments_info"] for one in segment(outputs(), threshold=0.85, target_sizes=torch.tensor(sizes))
    )
    assert alone == {"id": 0, "label_id": 3, "was_fused": False, "score": pytest.approx(0.9)}
    with pytest.raises(ValueError, match="give target_sizes"):
        segment(outputs())
    with pytest.raises(ValueError, match="have no masks"):
        segment(SimpleNamespace(**{**vars(outputs()), "pred_masks": None}), target_sizes=sizes)
