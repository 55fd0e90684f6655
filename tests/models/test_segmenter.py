import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, ResNetConfig, pipeline

import stepwell
from stepwell.heads.upernet import UperNetConfig
from stepwell.models.backbones import feature_maps
from stepwell.models.dense_config import StepwellSegmenterConfig
from stepwell.models.perception import PyramidBackboneConfig
from stepwell.models.perception_processor import StepwellSegmentationImageProcessor
from stepwell.models.segmenter import StepwellForSemanticSegmentation
from stepwell.ops.double import Doubled

PYRAMID = stepwell.DenseSettings(
    branches=stepwell.pyramid_branches(("vit_nano", 32), ("vit_nano", 64), interactions=2),
    interaction=stepwell.InteractionConfig(num_heads=2),
)
HEAD = UperNetConfig(channels=8, auxiliary_channels=4, pool_sizes=(1, 2))


def segmenter(window=64, backbone=PYRAMID, **config):
    torch.manual_seed(0)
    images = {"short_side": 64, "window": window, "stride": 48}
    config = StepwellSegmenterConfig(backbone, HEAD, images, **{"num_labels": 4, **config})
    return StepwellForSemanticSegmentation(config).eval()


def pictures(*sizes):
    torch.manual_seed(1)
    return [
        Image.fromarray(torch.randint(0, 255, (height, width, 3), dtype=torch.uint8).numpy())
        for height, width in sizes
    ]


def test_batch_equals_single():
    model = segmenter()
    processor = model.image_processor()
    given = pictures((40, 60), (60, 40), (64, 80))
    with torch.no_grad():
        together = model(**processor(given, return_tensors="pt"))
        classes = processor.post_process_semantic_segmentation(together, [x.size[::-1] for x in given])
        for i, picture in enumerate(given):
            alone = model(**processor([picture], return_tensors="pt"))
            height, width = together.image_sizes[i].tolist()
            assert alone.logits.shape[2:] == (height, width)
            torch.testing.assert_close(together.logits[i, :, :height, :width], alone.logits[0])
            assert classes[i].shape == picture.size[::-1]
            (expected,) = processor.post_process_semantic_segmentation(alone, [picture.size[::-1]])
            assert (classes[i] == expected).float().mean() > 0.999


def test_windows_slide_over_an_image_and_none_means_one_look():
    pixels = torch.randn(1, 3, 64, 112)
    sliding, whole = segmenter(), segmenter(window=0)
    with torch.no_grad():
        windows = [sliding._whole(pixels[..., left : left + 64])[0] for left in (0, 48)]
        expected = torch.cat(
            [windows[0][..., :48], (windows[0][..., 48:] + windows[1][..., :16]) / 2, windows[1][..., 16:]],
            -1,
        )
        torch.testing.assert_close(sliding(pixels).logits[0], expected)
        torch.testing.assert_close(whole(pixels).logits, whole._whole(pixels))
        assert not torch.equal(whole(pixels).logits, sliding(pixels).logits)


def test_losses_reach_every_parameter_and_training_looks_once():
    model = segmenter().train()
    labels = torch.randint(4, (2, 64, 64))
    labels[0, :8] = 255
    output = model(torch.randn(2, 3, 64, 64), labels=labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    output.loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((1, 64, 64), 4), "labels are 0 to 3 or 255, got 4"),
        (torch.full((1, 64, 64), -1), "got -1"),
        (torch.zeros(1, 32, 64), r"labels are \(1, 64, 64\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        segmenter()(torch.randn(1, 3, 64, 64), labels=labels)


def test_saved_and_opened_again_it_gives_the_same_through_the_pipeline(tmp_path):
    model = segmenter(id2label={0: "sky", 1: "sea", 2: "sand", 3: "boat"})
    model.save_pretrained(tmp_path)
    (picture,) = pictures((50, 90))
    parts = pipeline("image-segmentation", model=str(tmp_path))(picture)
    assert {part["label"] for part in parts} <= {"sky", "sea", "sand", "boat"}
    assert all(part["mask"].size == (90, 50) for part in parts)
    pixels = torch.randn(1, 3, 64, 96)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)
        assert torch.equal(stepwell.load(tmp_path)(pixels).logits, again(pixels).logits)


def test_a_processor_of_other_settings_stays_where_a_model_is_saved(tmp_path):
    model = segmenter()
    model.save_pretrained(tmp_path)
    StepwellSegmentationImageProcessor(short_side=200).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).short_side == 200
    model.image_processor().save_pretrained(tmp_path)
    segmenter(window=96).save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).short_side == 96


def test_a_backbone_of_transformers_stands_in_front():
    resnet = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    with torch.no_grad():
        assert segmenter(backbone=resnet)(torch.randn(1, 3, 64, 80)).logits.shape == (1, 4, 64, 80)


def test_the_image_of_a_segmenter_is_at_least_as_large_as_its_window():
    assert segmenter(window=96).image_processor().short_side == 96


def test_taken_over_for_other_classes_only_their_layers_start_anew(tmp_path):
    model = segmenter()
    model.save_pretrained(tmp_path)
    used = [torch.full((64, 7), float("nan")) for _ in range(200)]  # memory that was used before
    del used
    other = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    before, after = model.state_dict(), other.state_dict()
    changed = {name for name in after if after[name].shape != before[name].shape}
    assert {name.partition(".classifier")[0] for name in changed} == {"head", "head.auxiliary"}
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - changed)
    for name in changed:
        assert after[name].abs().max() < 0.1


def test_images_of_no_whole_cells_are_learnt_from_with_padding():
    """Which is ignored, and of which the mean over all pixels knows only what the labels have of it."""
    model, losses = segmenter().train(), []
    pixels, labels = torch.randn(2, 3, 70, 75), torch.randint(0, 4, (2, 70, 75))
    for beside, below in ((0, 0), (21, 26)):
        torch.manual_seed(2)
        pad = (0, beside, 0, below)
        given = F.pad(labels, pad, value=255)
        found = model(F.pad(pixels, pad), labels=given).losses
        losses.append({name: loss * given.numel() for name, loss in found.items()})
    torch.testing.assert_close(*losses)
    with torch.no_grad():
        model.backbone.eval()
        assert model.head(feature_maps(model.backbone, F.pad(pixels, (0, 21, 0, 26)))).shape[2:] == (24, 24)


def test_a_map_that_is_doubled_last_is_given_as_any_other():
    """By way of the coarsest map and of the auxiliary head's."""
    torch.manual_seed(0)
    backbone = PyramidBackboneConfig(PYRAMID, out_features=["stage1", "stage2"])
    head = UperNetConfig(channels=8, auxiliary_channels=4, pool_sizes=(1,), auxiliary_map=1)
    model = StepwellForSemanticSegmentation(StepwellSegmenterConfig(backbone, head, num_labels=4)).eval()
    pixels, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    assert isinstance(feature_maps(model.backbone, pixels)[-1], Doubled)
    losses = model.head.losses(model.backbone(pixels).feature_maps, labels)
    torch.testing.assert_close(model(pixels, labels=labels).losses, losses)


@pytest.mark.parametrize("images", [{"window": 64, "stride": 65}, {"stride": 513}])
def test_windows_that_leave_gaps_are_refused_when_a_model_is_described(images):
    with pytest.raises(ValueError, match="leaves gaps"):
        StepwellSegmenterConfig(PYRAMID, HEAD, images)


def test_an_image_of_no_whole_cells_is_looked_at_with_padding():
    model, pixels = segmenter(window=0), torch.randn(1, 3, 70, 75)
    with torch.no_grad():
        whole = model(F.pad(pixels, (0, 21, 0, 26))).logits
        torch.testing.assert_close(model(pixels).logits, whole[..., :70, :75])
