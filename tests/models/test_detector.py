import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    ResNetConfig,
    TimmBackboneConfig,
    pipeline,
)

import stepwell
from stepwell.heads.box_head import BoxHeadConfig
from stepwell.heads.cascade import CascadeConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.mask_head import MaskHeadConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import ProposalConfig, RpnConfig
from stepwell.models.backbones import outline
from stepwell.models.dense_config import StepwellDetectorConfig
from stepwell.models.detector import StepwellForInstanceSegmentation, StepwellForObjectDetection

PYRAMID = stepwell.DenseSettings(
    branches=stepwell.pyramid_branches(("vit_nano", 32), ("vit_nano", 64), interactions=2),
    interaction=stepwell.InteractionConfig(num_heads=2),
)
STAGES = CascadeConfig().stages
IMAGES = {"long_limit": 96, "short_limit": 64, "size_divisor": 32}
SMALL = {
    "dim": 16,
    "rpn": RpnConfig(dim=16, testing=ProposalConfig(per_level=50, num=30)),
    "mask": MaskHeadConfig(dim=8, num_convs=1),
}
BOX = BoxHeadConfig(dim=16)
HEADS = {
    "rcnn": RcnnConfig(**SMALL, box=BOX),
    "faster": RcnnConfig(**SMALL, box=BOX, masks=False),
    "cascade": CascadeConfig(
        **SMALL, stages=tuple(replace(stage, box=replace(stage.box, dim=16, conv_dim=16)) for stage in STAGES)
    ),
    "dino": DinoConfig(
        dim=16,
        num_queries=20,
        encoder_layers=1,
        decoder_layers=2,
        ffn_dim=32,
        num_heads=2,
        self_attention_heads=2,
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
    with torch.no_grad():  # with a gradient, convolutions take other memory and round otherwise
        assert torch.equal(stepwell.load(tmp_path)(pixels).scores, a.scores)


def test_boxes_and_masks_come_back_in_pixels_of_the_original_through_pipelines(tmp_path):
    torch.manual_seed(0)
    config = StepwellDetectorConfig(PYRAMID, HEADS["rcnn"], IMAGES, id2label={0: "cat", 1: "dog", 2: "cow"})
    model = StepwellForInstanceSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    (picture,) = images((50, 90))
    found = pipeline("object-detection", model=str(tmp_path))(picture, threshold=0.0)
    with torch.no_grad():
        output = model(**model.image_processor()([picture], return_tensors="pt"))
    assert len(found) == (output.labels[0] >= 0).sum()
    assert {one["label"] for one in found} <= {"cat", "dog", "cow"}
    left, top, right, bottom = (output.pred_boxes[0, 0] * torch.tensor([90, 50, 90, 50])).int().tolist()
    assert found[0]["box"] == {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom}
    segments = pipeline("image-segmentation", model=model, image_processor=model.image_processor())
    masks = segments(picture, threshold=0.0, mask_threshold=1e-6, overlap_mask_area_threshold=0.0)
    assert masks
    assert all(segment["mask"].size == (90, 50) for segment in masks)


def test_a_head_without_masks_segments_no_instances():
    config = StepwellDetectorConfig(PYRAMID, HEADS["faster"], IMAGES)
    with pytest.raises(ValueError, match="finds boxes without masks"):
        StepwellForInstanceSegmentation(config)


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        (TimmBackboneConfig(backbone="resnet10t", out_indices=[2, 3, 4]), [8, 16, 32]),
        (
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 24, 32],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=["stage2", "stage3"],
            ),
            [8, 16],
        ),
    ],
)
@pytest.mark.parametrize("head", ["rcnn", "dino"])
def test_any_backbone_stands_in_front_of_any_head(backbone, strides, head, tmp_path):
    config = StepwellDetectorConfig(backbone, HEADS[head], IMAGES, num_labels=2)
    model = StepwellForObjectDetection(config)
    assert outline(model.backbone)[1] == strides
    model(torch.randn(1, 3, 64, 64), labels=labels(2)).loss.backward()
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = again(torch.randn(1, 3, 64, 96))
    assert found.labels.max() < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": torch.tensor([3])}, "class_labels are 0 to 2"),
        ({"class_labels": torch.tensor([0, 1])}, "need boxes"),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.0, 0.2]])}, "need a width and a height"),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.2, float("nan")]])}, "need a width and a height"),
        ({"masks": torch.ones(1, 65, 64)}, "need masks of at most 64x64"),
        ({"masks": torch.ones(2, 64, 64)}, "need masks"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    model = StepwellForObjectDetection(StepwellDetectorConfig(PYRAMID, HEADS["rcnn"], IMAGES, num_labels=3))
    (given,) = labels(1)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 64, 64), labels=[given | change])
    with pytest.raises(ValueError, match="one set an image"):
        model(torch.randn(2, 3, 64, 64), labels=[given])


def test_a_head_stays_in_single_precision_when_a_model_is_loaded_in_half(tmp_path):
    config = StepwellDetectorConfig(PYRAMID, HEADS["rcnn"], IMAGES)
    StepwellForObjectDetection(config).save_pretrained(tmp_path)
    model = StepwellForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": {"kind": "yolo"}}, "head: "),
        ({"head": {"kind": "rcnn", "dims": 3}}, "dims"),
        ({"images": {"long_limit": 0}}, "images: long_limit"),
        ({"images": {"long_limit": 64, "short_limit": 65}}, "short_limit 65 is above long_limit 64"),
        ({"backbone_config": {"sizes": [1]}}, "model_type"),
        ({"backbone_config": 3}, "got int"),
        ({"num_lables": 3}, "num_lables"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        StepwellDetectorConfig(**wrong)


def test_taken_over_for_other_classes_only_their_layers_start_anew(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    before = detector.state_dict()
    used = [torch.full((64, 7), float("nan")) for _ in range(200)]  # memory that was used before
    del used
    model = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    after = model.state_dict()
    changed = {name for name in after if after[name].shape != before[name].shape}
    assert changed
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - changed)
    for name in changed:
        assert after[name].isfinite().all()
        assert after[name].abs().max() < 10
        assert after[name].ndim == 1 or after[name].std() > 0


@pytest.mark.parametrize("size", [(1, 1), (20, 400), (400, 20)])
def test_an_image_of_any_shape_is_looked_at(detector, size):
    (picture,) = images(size)
    processor = detector.image_processor()
    with torch.no_grad():
        output = detector(**processor([picture], return_tensors="pt"))
    (found,) = processor.post_process_object_detection(output, 0.0, [size])
    assert found["boxes"].isfinite().all()
    assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2) + 1e-3).all()


def test_no_image_at_all_is_refused(detector):
    with pytest.raises(ValueError, match="hold no image"):
        detector(torch.zeros(0, 3, 64, 64))


def test_padding_beyond_the_largest_image_changes_no_loss(detector):
    """Such batches are parts of larger ones, or padded to a fixed size."""
    detector.train()
    pixels, mask = torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96)
    pixels[1, :, :, 64:] = mask[1, :, 64:] = 0
    given = {"labels": labels(2, 1)}
    losses = []
    for beside, below in ((0, 0), (64, 32)):
        torch.manual_seed(2)
        pad = (0, beside, 0, below)
        losses.append(detector(F.pad(pixels, pad), pixel_mask=F.pad(mask, pad), **given).losses)
    torch.testing.assert_close(*losses)


def test_boxes_are_in_parts_of_the_image_without_its_padding(detector):
    pixels, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96)
    mask[:, :50, :70] = 1
    calls = []
    detector.head.register_forward_hook(lambda _, given, out: calls.append((given, out)))
    with torch.no_grad():
        output = detector(pixels, pixel_mask=mask, labels=labels(1))
    ((_, (extent,), (objects,)), _), (_, (found,)) = calls
    assert extent.valid == (50, 70)
    torch.testing.assert_close(objects.boxes, torch.tensor([[0.25 * 70, 0.3 * 50, 0.55 * 70, 0.7 * 50]]))
    torch.testing.assert_close(output.pred_boxes[0] * torch.tensor([70, 50, 70, 50]), found.boxes)
    assert len(found.boxes)
