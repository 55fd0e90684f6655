"""`model.predict` of tiny models, against what models and processors give by themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import ImageClassifierOutput

import stepwell
from stepwell.heads.box_head import BoxHeadConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.mask_head import MaskHeadConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import ProposalConfig, RpnConfig
from stepwell.heads.upernet import UperNetConfig
from stepwell.models.detection_processor import StepwellDetectionImageProcessor
from stepwell.ops.paste import paste

BRANCHES = stepwell.pyramid_branches(("vit_nano", 32), ("vit_nano", 64), interactions=2)
INTERACTION = stepwell.InteractionConfig(num_heads=2)
PYRAMID = stepwell.DenseSettings(branches=BRANCHES, interaction=INTERACTION)
NAMES = {0: "cat", 1: "dog", 2: "cow"}
HEADS = {
    "rcnn": RcnnConfig(
        dim=16,
        rpn=RpnConfig(dim=16, testing=ProposalConfig(per_level=50, num=30)),
        mask=MaskHeadConfig(dim=8, num_convs=1),
        box=BoxHeadConfig(dim=16),
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
IMAGES = {"long_limit": 96, "short_limit": 64, "size_divisor": 32}


def detector(head="rcnn"):
    torch.manual_seed(0)
    config = stepwell.StepwellDetectorConfig(PYRAMID, HEADS[head], IMAGES, id2label=NAMES)
    return stepwell.StepwellForObjectDetection(config)


def segmenter():
    torch.manual_seed(0)
    config = stepwell.StepwellSegmenterConfig(
        PYRAMID,
        UperNetConfig(channels=8, auxiliary_channels=4, pool_sizes=(1, 2)),
        {"short_side": 64, "window": 64, "stride": 48},
        id2label=NAMES,
    )
    return stepwell.StepwellForSemanticSegmentation(config)


def classifier():
    torch.manual_seed(0)
    settings = stepwell.ClassifierSettings(branches=BRANCHES, interaction=INTERACTION)
    config = stepwell.PyramidClassifierConfig(settings, num_labels=7)
    return stepwell.PyramidForImageClassification(config)


MODELS = {
    "rcnn": detector,
    "dino": lambda: detector("dino"),
    "segmenter": segmenter,
    "classifier": classifier,
}
ANY = {"rcnn": {"threshold": 0}, "dino": {"threshold": 0}, "segmenter": {}, "classifier": {}}


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return MODELS[kind]()


def pictures(*sizes):
    random = np.random.default_rng(1)
    return [
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for height, width in sizes
    ]


def assert_alike(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, stepwell.Segmentation):
        assert (found.labels == expected.labels).float().mean() > 0.999
        return
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    assert (found.labels == expected.labels).all()
    if isinstance(found, stepwell.Detections):
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-2, rtol=1e-3)


def convolutional(size):
    """A branch of a tiny ConvNeXt, whose coarsest cell is 32 pixels of its view."""
    arguments = {"dims": (64, 64, 64, 64), "depths": (1, 1, 1, 1), "layer_scale": None}
    runs = ((0, 0), (1, 2), (3, 4), (5, 6))
    return stepwell.BranchConfig(encoder="convnext_t", size=size, interactions=runs, arguments=arguments)


@pytest.mark.parametrize("tiles", [None, stepwell.Tiles(size=64)])
def test_more_objects_than_the_head_is_made_for_may_be_asked_for(tiles):
    finder = detector()
    few = RcnnConfig(
        **{**vars(finder.head.config), "selection": replace(finder.head.config.selection, num=3)}
    )
    (image,) = pictures((64, 90))
    every = finder.predict(image, threshold=0, tiles=tiles)
    finder.head.config = few
    assert len(every) > (10 if tiles is None else 20)
    assert len(finder.predict(image, threshold=0)) == 3
    assert_alike(finder.predict(image, threshold=0, max_detections=100, tiles=tiles), every)
    assert len(finder.predict(image, threshold=0, max_detections=2, tiles=tiles)) == 2
    assert finder.head.config is few


def test_what_is_predicted_may_be_changed_in_place_and_learnt_from(kind, model):
    (image,) = pictures((64, 64))
    for part in vars(model.predict(image, **ANY[kind])).values():
        assert not (isinstance(part, torch.Tensor) and (part.is_inference() or part.requires_grad))


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("dino", ""),
        ("segmenter", ""),
        ("classifier", ""),
        ("rcnn", "backbone"),
        ("rcnn", "head.rpn.deltas"),
        ("rcnn", "head.rpn.objectness"),
        ("rcnn", "head.box"),
        ("rcnn", "head.mask"),
    ],
)
def test_outputs_that_are_no_numbers_are_refused(kind, part):
    broken = MODELS[kind]()
    with torch.no_grad():
        for parameter in broken.get_submodule(part).parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's outputs are no numbers"):
        broken.predict(pictures((64, 64))[0])


def test_of_a_sliver_every_branch_sees_a_cell_and_nothing_is_refused():
    """Of 32 pixels, which the processor pads to, the branch that looks at half of them would see none."""
    pyramid = stepwell.DenseSettings(
        branches=(convolutional(32), convolutional(64)),
        interaction=INTERACTION,
        merge_after=(0, 1, 2),
        operations=(),
    )
    torch.manual_seed(0)
    finder = stepwell.StepwellForObjectDetection(
        stepwell.StepwellDetectorConfig(pyramid, HEADS["rcnn"], IMAGES, id2label=NAMES)
    )
    config = stepwell.StepwellSegmenterConfig(
        pyramid,
        UperNetConfig(channels=8, auxiliary_channels=4, pool_sizes=(1,)),
        {"short_side": 16, "window": 0},
        id2label=NAMES,
    )
    labeller = stepwell.StepwellForSemanticSegmentation(config)
    assert finder.smallest == labeller.smallest == 64
    given = pictures((2, 160), (160, 2), (1, 1), (64, 96))
    for model, options in ((finder, {"threshold": 0.0}), (labeller, {})):
        alone = [model.predict(picture, **options) for picture in given]
        for found, expected in zip(model.predict(given, batch=4, **options), alone, strict=True):
            if model is finder:  # the boxes of scores that are all but equal may change places
                torch.testing.assert_close(found.scores, expected.scores)
            else:
                assert_alike(found, expected)
        tiled = model.predict(given[0], tiles=stepwell.Tiles(size=40), **options)
        assert tiled.image_size == (2, 160)


def test_one_in_one_out_and_a_batch_finds_what_each_picture_alone_does(kind, model):
    given = pictures((40, 60), (60, 40), (64, 64), (40, 60))
    together = model.predict(given, batch=3, **ANY[kind])
    alone = [model.predict(picture, **ANY[kind]) for picture in given]
    assert isinstance(together, list)
    assert len(together) == 4
    for found, expected, picture in zip(together, alone, given, strict=True):
        assert_alike(found, expected)
        assert found.image_size == (picture.height, picture.width)
    assert model.predict([]) == []
    assert len(model.predict((given[0],))) == 1


def test_pictures_may_be_files_bytes_and_arrays(kind, model, tmp_path):
    (picture,) = pictures((50, 70))
    picture.save(tmp_path / "a.png")
    expected = model.predict(picture, **ANY[kind])
    for given in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), np.array(picture)):
        assert_alike(model.predict(given, **ANY[kind]), expected)


def test_a_model_in_training_goes_on_as_it_was(kind, model):
    model.train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()
    model.predict(pictures((40, 40))[0])
    assert model.training
    assert not frozen.training
    frozen.train()
    assert all(module.training for module in model.modules())


def test_predictions_do_not_depend_on_the_mode(kind, model):
    (picture,) = pictures((40, 60))
    expected = model.eval().predict(picture, **ANY[kind])
    assert_alike(model.train().predict(picture, **ANY[kind]), expected)


def test_objects_are_those_of_the_processor_in_pixels_of_the_source():
    model = detector().eval()
    (picture,) = pictures((50, 90))
    found = model.predict(picture, threshold=0.2)
    processor = model.image_processor()
    with torch.no_grad():
        output = model(**processor([picture], return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(output, 0.2, [(50, 90)])
    torch.testing.assert_close(found.boxes, expected["boxes"])
    torch.testing.assert_close(found.scores, expected["scores"])
    masks = paste(output.pred_masks[0, : len(found)].float(), expected["boxes"], (50, 90), threshold=0.5)
    assert (found.masks.whole() == masks).all()
    assert set(found.names()) <= set(NAMES.values())
    assert len(model.predict(picture, threshold=0.0, max_detections=2)) == 2
    assert torch.equal(
        model.predict(picture, threshold=0.0, max_detections=2).scores,
        model.predict(picture, threshold=0.0).scores[:2],
    )
    assert len(model.predict(picture, threshold=1.0)) == 0


def test_objects_above_a_half_are_what_is_found_by_default():
    model = detector()
    (picture,) = pictures((50, 90))
    with torch.no_grad():
        model.head.box.classes.bias[0] = 1.0 if hasattr(model.head, "box") else 0.0
    every = model.predict(picture, threshold=0.0)
    assert len(model.predict(picture)) == int((every.scores > 0.5).sum())


def test_classes_of_a_picture_are_the_best_five():
    model = classifier().eval()
    (picture,) = pictures((50, 90))
    found = model.predict(picture)
    with torch.no_grad():
        logits = model(**model.image_processor()([picture], return_tensors="pt")).logits[0]
    torch.testing.assert_close(found.scores, logits.softmax(0).sort(descending=True).values[:5])
    assert found.labels.tolist() == logits.argsort(descending=True)[:5].tolist()
    assert len(model.predict(picture, max_detections=7)) == 7
    assert len(model.predict(picture, threshold=float(found.scores[2]))) == 2
    model.config.problem_type = "multi_label_classification"
    torch.testing.assert_close(
        model.predict(picture).scores, logits.sigmoid().sort(descending=True).values[:5]
    )


def test_classes_are_ranked_where_their_scores_round_to_the_same(monkeypatch):
    model = classifier()
    logits = torch.tensor([[-300.0, 60, -200, 300, -100, 59, 61]])
    monkeypatch.setattr(model, "forward", lambda **_: ImageClassifierOutput(logits=logits))
    (picture,) = pictures((50, 90))
    assert model.predict(picture).labels.tolist() == [3, 6, 1, 5, 4]
    assert model.predict(picture, threshold=0.0).labels.tolist() == [3]
    model.config.problem_type = "multi_label_classification"
    assert model.predict(picture).labels.tolist() == [3, 6, 1, 5, 4]


def test_one_tile_over_the_whole_picture_finds_what_plain_prediction_does():
    for model, options in ((detector(), {"threshold": 0.0}), (segmenter(), {})):
        for size, scale in (((64, 90), 1.0), ((128, 160), 0.5), ((32, 40), 2.0)):
            (picture,) = pictures(size)
            found = model.predict(picture, tiles=stepwell.Tiles(size=500, scale=scale), **options)
            expected = model.predict(picture, **options)
            assert_alike(found, expected)
            if isinstance(found, stepwell.Detections):
                assert (found.masks.whole() == expected.masks.whole()).all()


def test_tiles_are_as_large_as_the_models_own_view(monkeypatch):
    seen = []
    model = segmenter()
    forward = type(model).forward

    def watched(self, pixel_values, **kwargs):
        seen.append(tuple(pixel_values.shape))
        return forward(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    (picture,) = pictures((100, 200))
    found = model.predict(picture, tiles=stepwell.Tiles(), batch=3)
    assert found.image_size == (100, 200)
    assert seen == [(3, 3, 64, 64)] * 2 + [(2, 3, 64, 64)]


def test_many_tiles_of_a_detector_stay_in_the_picture_and_keep_to_the_best():
    model = detector()
    (picture,) = pictures((150, 210))
    found = model.predict(picture, tiles=stepwell.Tiles(), threshold=0.0, max_detections=5, batch=4)
    assert len(found) == 5
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert (found.boxes <= torch.tensor([210.0, 150.0, 210.0, 150.0]) + 1e-3).all()
    assert found.masks.image_size == (150, 210)
    every = model.predict(picture, tiles=stepwell.Tiles(), threshold=0.0)
    assert torch.allclose(every.scores[:5], found.scores, atol=1e-5)
    assert every.boxes[:, 2].max() > 150


def test_the_processor_that_lies_beside_the_weights_is_used(tmp_path):
    model = detector()
    model.save_pretrained(tmp_path / "model")
    other = StepwellDetectionImageProcessor(long_limit=160, short_limit=128, size_divisor=32)
    other.save_pretrained(tmp_path / "model")
    (picture,) = pictures((50, 90))
    loaded = stepwell.load(tmp_path / "model")
    assert loaded.image_processor().short_limit == 128
    assert model.image_processor().short_limit == 64
    found = loaded.predict(picture, threshold=0.0)
    with model.looking_through(other):
        assert_alike(found, model.predict(picture, threshold=0.0))
    assert model.kept_processor is None
    model.kept_processor = other
    assert_alike(found, model.predict(picture, threshold=0.0))
    loaded.save_pretrained(tmp_path / "again")
    assert stepwell.load(tmp_path / "again").image_processor().short_limit == 128
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert stepwell.load(tmp_path / "model").image_processor().short_limit == 64


def test_loaded_models_predict(kind, model, tmp_path):
    model.save_pretrained(tmp_path)
    (picture,) = pictures((50, 90))
    assert_alike(stepwell.load(tmp_path).predict(picture, **ANY[kind]), model.predict(picture, **ANY[kind]))


def test_a_processor_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    detector().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"short_limit": "wide"}')
    with pytest.raises(ValueError, match="no image processor that can be used") as raised:
        stepwell.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (segmenter, {"threshold": 0.5}, "has no threshold"),
        (segmenter, {"max_detections": 3}, "no max_detections"),
        (classifier, {"tiles": stepwell.Tiles()}, "takes no tiles"),
        (detector, {"threshold": 1.5}, "score of 0 to 1"),
        (detector, {"max_detections": 0}, "from 1 on"),
        (detector, {"batch": 0}, "from 1 on"),
        (detector, {"batch": 1.5}, "whole number"),
        (detector, {"max_detections": 2.5}, "whole number"),
        (detector, {"tiles": True}, "stepwell.Tiles"),
    ],
)
def test_what_a_model_does_not_have_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make().predict([], **options)


def test_pictures_in_tiles_may_be_larger_than_others():
    image = Image.new("RGB", (9000, 8000))
    limits = replace(stepwell.ImageLimits(), max_pixels=100)
    model = classifier()
    with pytest.raises(stepwell.ImageError, match="max_pixels"):
        model.predict(encoded(Image.new("RGB", (20, 20))), limits=limits)
    with pytest.raises(stepwell.ImageError, match="max_pixels=72000000"):
        model.predict(encoded(image))
    small = detector()
    small.predict(encoded(Image.new("RGB", (20, 20))), tiles=stepwell.Tiles(size=64))
    with pytest.raises(stepwell.ImageError, match="max_pixels"):
        small.predict(encoded(Image.new("1", (16000, 16000))), tiles=stepwell.Tiles())


def encoded(image):
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
