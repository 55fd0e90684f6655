import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
)

import stepwell
from stepwell.heads.cascade import CascadeConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.models.dense_config import StepwellDetectorConfig
from stepwell.models.detector import StepwellForObjectDetection

PYRAMID = stepwell.DenseSettings(
    branches=stepwell.pyramid_branches(("vit_nano", 32), ("vit_nano", 64), interactions=2),
    interaction=stepwell.InteractionConfig(num_heads=2),
)
IMAGES = {"long_limit": 96, "short_limit": 64, "size_divisor": 32}
HEADS = {
    "rcnn": RcnnConfig(dim=16),
    "faster": RcnnConfig(dim=16, masks=False),
    "cascade": CascadeConfig(dim=16),
    "dino": DinoConfig(
        dim=16,
        num_queries=20,
        ffn_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        deformable_heads=2,
        query_heads=2,
        norm_groups=4,
    ),
}


@pytest.fixture(params=HEADS)
def detector(request):
    torch.manual_seed(0)
    config = StepwellDetectorConfig(PYRAMID, HEADS[request.param], IMAGES, num_labels=3)
    return StepwellForObjectDetection(config).eval()


def images(*sizes):
    torch.manual_seed(1)
    return [
        Image.fromarray(torch.randint(0, 255, (height, width, 3), dtype=torch.uint8).numpy())
        for height, width in sizes
    ]


def labels(*counts, size=(64, 64)):
    return [
        {
            "class_labels": torch.arange(count) % 3,
            "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.4]] * count).view(-1, 4)
            + 0.02 * torch.arange(count)[:, None],
            "masks": torch.ones(count, *size, dtype=torch.uint8),
        }
        for count in counts
    ]


def test_batch_equals_single(detector):
    processor = detector.image_processor()
    pictures = images((40, 60), (60, 40), (64, 64))
    batch = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        together = detector(**batch)
        for i, picture in enumerate(pictures):
            alone = detector(**processor([picture], return_tensors="pt"))
            count = alone.scores.shape[1]
            torch.testing.assert_close(together.scores[i, :count], alone.scores[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                together.pred_boxes[i, :count], alone.pred_boxes[0], atol=1e-4, rtol=1e-4
            )
            assert (together.labels[i, :count] == alone.labels[0]).all()
            assert (together.labels[i, count:] == -1).all()


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_losses_reach_every_parameter(detector, counts):
    detector.train()
    output = detector(torch.randn(2, 3, 64, 64), labels=labels(*counts))
    assert output.scores is None
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    output.loss.backward()
    idle = [name for name, p in detector.named_parameters() if p.grad is None and name.startswith("head")]
    assert not idle


def test_saved_and_opened_again_it_finds_the_same(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 96)
    kinds = [AutoModelForObjectDetection]
    if getattr(detector.config.head_settings, "masks", False):
        kinds.append(AutoModelForInstanceSegmentation)
    for kind in kinds:
        again = kind.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            a, b = detector(pixels), again(pixels)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_boxes, b.pred_boxes)
    assert json.loads((tmp_path / "config.json").read_text())["head"]["kind"] == detector.config.head["kind"]
    assert torch.equal(stepwell.load(tmp_path)(pixels).scores, a.scores)
