"""Detectors, segmenters and classifiers on small data: their scores, their reports, and how a run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import stepwell
from stepwell import cli
from stepwell.data.coco import CocoFile
from stepwell.data.masks import decode_mask, encode_mask
from stepwell.evaluate.perception import evaluate_perception
from stepwell.evaluate.perception_data import true_objects
from stepwell.heads.box_head import BoxHeadConfig
from stepwell.heads.mask_head import MaskHeadConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import ProposalConfig, RpnConfig
from stepwell.heads.upernet import UperNetConfig
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.detector import DetectorOutput, StepwellForObjectDetection
from stepwell.models.perception import PyramidClassifierConfig, PyramidForImageClassification
from stepwell.models.perception_processor import StepwellSegmentationImageProcessor
from stepwell.models.segmenter import SegmenterOutput, StepwellForSemanticSegmentation

BRANCHES = stepwell.pyramid_branches(("vit_nano", 32), ("vit_nano", 64), interactions=2)
PYRAMID = stepwell.DenseSettings(branches=BRANCHES, interaction=stepwell.InteractionConfig(num_heads=2))
HEAD = RcnnConfig(
    dim=16,
    rpn=RpnConfig(dim=16, testing=ProposalConfig(per_level=50, num=30)),
    mask=MaskHeadConfig(dim=8, num_convs=1),
    box=BoxHeadConfig(dim=16),
)
NAMES = {0: "ant", 1: "bee", 2: "cat"}


def labels(names=NAMES):
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    images = {"long_limit": 96, "short_limit": 64, "size_divisor": 32}
    return StepwellForObjectDetection(StepwellDetectorConfig(PYRAMID, HEAD, images, **labels())).eval()


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    head = UperNetConfig(channels=8, auxiliary_channels=4, pool_sizes=(1, 2))
    images = {"short_side": 64, "window": 64, "stride": 48}
    return StepwellForSemanticSegmentation(StepwellSegmenterConfig(PYRAMID, head, images, **labels())).eval()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    settings = stepwell.ClassifierSettings(branches=BRANCHES)
    return PyramidForImageClassification(PyramidClassifierConfig(settings, **labels())).eval()


def picture(path, size=(48, 64), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size[1], size[0]), (value, 50, 50)).save(path)


@pytest.fixture
def coco(tmp_path):
    """Three images in images/, a file in annotations/, whose categories are the model's in another order."""
    annotations = []
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", value=60 * i)
        left, top, width, height = 4.0 + i, 6.0, 40.0, 30.0
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 7 if i else 3,
                "bbox": [left, top, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    content = {
        "images": [{"id": i, "file_name": f"images/{i}.png", "width": 64, "height": 48} for i in range(3)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
    }
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "val.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def maps(tmp_path):
    for i in range(2):
        picture(tmp_path / "pictures" / f"{i}.png")
        numbers = np.full((48, 64), 9, np.uint8)
        numbers[:, : 16 * (i + 1)] = 5
        numbers[0] = 255
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.fromarray(numbers).save(tmp_path / "maps" / f"{i}.png")
    (tmp_path / "classes.json").write_text('[{"id": 9, "name": "cat"}, {"id": 5, "name": "ant"}]')
    return tmp_path / "maps"


@pytest.fixture
def folders(tmp_path):
    for i, name in enumerate(("bee", "bee", "cat")):
        picture(tmp_path / "photos" / name / f"{i}.png", value=80 * i)
    return tmp_path / "photos"


def knows(monkeypatch, model, forward):
    """The model, with a forward pass of the test's."""
    monkeypatch.setattr(model, "forward", forward)
    return model


def exact(image, count=1):
    """Detections of the object of an image, as the network says them."""
    left, label = 4.0 + image, 2 if image else 0
    box = torch.tensor([left / 64, 6 / 48, (left + 40) / 64, 36 / 48])
    return DetectorOutput(
        scores=torch.full((1, count), 0.9),
        labels=torch.full((1, count), label),
        pred_boxes=box.expand(1, count, 4),
        pred_masks=torch.ones(1, count, 28, 28),
    )


def test_a_detector_that_is_right_scores_1_whatever_the_order_of_classes(
    detector, coco, tmp_path, monkeypatch
):
    images = iter(range(3))
    model = knows(monkeypatch, detector, lambda **inputs: exact(next(images)))
    report = evaluate_perception(model, coco, tmp_path / "out")
    assert report.result["boxes"].ap == pytest.approx(1)
    assert report.result["masks"].ap == pytest.approx(1)
    assert report.result["boxes"].classes["ant"].objects == 1
    assert report.result["boxes"].ap_medium == pytest.approx(1)
    assert report.remarks[0] == "The model knows 1 classes that the data lack: bee"
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert told["scores"]["masks"]["ap50"] == pytest.approx(1)
    assert told["task"] == "detection"
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| boxes | 1.0000 | 1.0000 | 1.0000 | - | 1.0000 | - | 1.0000 |" in page
    assert "| cat | 2 | 1.0000 | 1.0000 | 1.0000 | 1.0000 |" in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "found.jsonl",
        "pr_curve.png",
        "report.md",
        "scores.json",
        "settings.json",
    }


def test_detections_are_the_models_own_and_as_many_as_asked_for(detector, coco, tmp_path):
    before = detector.head.config
    few = evaluate_perception(detector, coco, tmp_path / "few", max_detections=3, batch_size=2, limit=2)
    many = evaluate_perception(detector, coco, tmp_path / "many", max_detections=30, limit=1)
    assert detector.head.config is before
    assert (few.result["boxes"].max_detections, many.result["boxes"].max_detections) == (3, 30)
    records = {
        name: json.loads((tmp_path / name / "found.jsonl").read_text().splitlines()[0])["found"]
        for name in ("few", "many")
    }
    with Image.open(coco.parent.parent / "images" / "0.png") as image:
        inputs = detector.image_processor()(image, return_tensors="pt")
        (own,) = detector.image_processor().post_process_object_detection(
            detector(**inputs), threshold=0.0, target_sizes=[(48, 64)]
        )
    for name, count in (("few", 3), ("many", 30)):
        kept = [
            i for i, label in enumerate(own["labels"][:count].tolist()) if label != 1
        ]  # no bees in the data
        assert 0 < len(kept) <= count < len(own["labels"])
        assert records[name]["scores"] == pytest.approx(own["scores"][kept].tolist(), abs=1e-5)
        boxes = own["boxes"][kept].detach().numpy()
        assert np.array(records[name]["boxes"]) == pytest.approx(boxes, abs=1e-2)


def test_images_are_looked_at_in_tiles(detector, segmenter, coco, maps, tmp_path):
    """What `predict` finds in them that way, which is not what it finds in the whole."""
    tiles = stepwell.Tiles(size=32, overlap=0.5)
    for model, data in ((detector, coco), (segmenter, maps)):
        folder = tmp_path / model.config.model_type
        options = {"max_detections": 20} if model is detector else {"images": tmp_path / "pictures"}
        cut = evaluate_perception(model, data, folder / "cut", tiles=tiles, **options)
        whole = evaluate_perception(model, data, folder / "whole", **options)
        assert cut.about["settings"]["tiles"] == {"size": 32, "overlap": 0.5, "scale": 1.0}
        assert "tiles" not in whole.about["settings"]
        lines = [(folder / name / "found.jsonl").read_text().splitlines() for name in ("cut", "whole")]
        records = [[json.loads(line)["found"] for line in of] for of in lines]
        assert records[0] != records[1]
        if model is detector:
            own = model.predict(
                coco.parent.parent / "images" / "0.png", threshold=0.0, tiles=tiles, max_detections=20
            )
            scores = [
                s for s, label in zip(own.scores.tolist(), own.labels.tolist(), strict=True) if label != 1
            ]
            assert records[0][0]["scores"] == pytest.approx(scores, abs=1e-5)
        with pytest.raises(ValueError, match=r"tiles\.size was 32 and is 16, tiles\.overlap was"):
            evaluate_perception(model, data, folder / "cut", tiles=stepwell.Tiles(size=16), **options)


def test_tiles_go_through_the_network_together(detector, coco, tmp_path, monkeypatch):
    """Those of one image, since large ones are not kept open beside each other."""
    looked, predict = [], type(detector).predict

    def counted(self, images, **options):
        looked.append((len(images), options["batch"]))
        return predict(self, images, **options)

    monkeypatch.setattr(type(detector), "predict", counted)
    tiles = stepwell.Tiles(size=32, overlap=0.5)
    evaluate_perception(detector, coco, tmp_path / "several", tiles=tiles, batch_size=4, limit=2)
    assert looked == [(1, 4), (1, 4)]
    evaluate_perception(detector, coco, tmp_path / "alone", tiles=tiles, limit=2)
    assert looked[2:] == [(1, 1), (1, 1)]
    lines = [(tmp_path / name / "found.jsonl").read_text().splitlines() for name in ("several", "alone")]
    for one, other in zip(*lines, strict=True):
        scores = [json.loads(line)["found"]["scores"] for line in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    evaluate_perception(detector, coco, tmp_path / "whole", batch_size=2, limit=2)
    assert looked[4:] == [(2, 2)]


def test_data_open_images_as_large_as_the_run_lets_in(detector, segmenter, coco, yolo, maps, tmp_path):
    """Their sizes and their maps too, and what is drawn of them."""
    small = replace(stepwell.ImageLimits(), max_pixels=1000)
    for name, model, data, options in (
        ("coco", detector, coco, {}),
        ("yolo", detector, yolo, {"split": "val"}),
        ("maps", segmenter, maps, {"images": tmp_path / "pictures"}),
    ):
        bad = evaluate_perception(model, data, tmp_path / name, limits=small, **options).bad_images
        assert bad
        assert "max_pixels=3072" in bad[0].reason
    wide = tmp_path / "pictures" / "0.png"
    picture(wide, size=(10, 4000))
    Image.new("L", (4000, 10), 5).save(tmp_path / "maps" / "0.png")
    limits = replace(stepwell.ImageLimits(), max_aspect=400.0)
    report = evaluate_perception(
        segmenter, maps, tmp_path / "wide", images=tmp_path / "pictures", limits=limits, pictures=2,
        tiles=stepwell.Tiles(size=64, scale=0.25),
    )  # fmt: skip
    assert not report.bad_images
    assert (tmp_path / "wide" / "worst.png").is_file()


def test_larger_images_are_let_in_where_they_are_cut_into_tiles(segmenter, maps, tmp_path):
    """As `predict` lets them in."""
    picture(tmp_path / "pictures" / "0.png", size=(120, 20_000))
    Image.new("L", (20_000, 120), 5).save(tmp_path / "maps" / "0.png")
    options = {"images": tmp_path / "pictures", "limit": 1}
    whole = evaluate_perception(segmenter, maps, tmp_path / "whole", **options)
    assert "max_side" in whole.bad_images[0].reason
    cut = evaluate_perception(
        segmenter, maps, tmp_path / "cut", tiles=stepwell.Tiles(size=64, scale=0.1), **options
    )
    assert not cut.bad_images


def test_a_threshold_leaves_out_what_scores_no_higher(detector, coco, tmp_path, monkeypatch):
    model = knows(monkeypatch, detector, lambda **inputs: exact(0))
    report = evaluate_perception(model, coco, tmp_path / "out", threshold=0.95)
    assert report.result["boxes"].ap == 0


def test_masks_are_in_the_pixels_of_the_upright_image(tmp_path):
    picture(tmp_path / "a.jpg", size=(10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.jpg", exif=exif)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 2]}
    counts = [0, *[2, 8] * 3, 2, 168]  # columns of ten pixels
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}],
        "annotations": [annotation | {"segmentation": {"size": [10, 20], "counts": counts}}],
        "categories": [{"id": 1, "name": "ant"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    source = CocoFile(tmp_path / "a.json", images=tmp_path)
    truth = true_objects(source[0], masks=True)
    mask = decode_mask(truth.masks[0], (20, 10))
    left, top, right, bottom = map(int, truth.boxes[0])
    assert mask.shape == (20, 10)
    assert mask.sum() == mask[top:bottom, left:right].sum() == 8


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ({"size": [48, 64], "counts": [5, 5]}, "counts do not add up to the 3072 pixels of its image"),
        ({"size": [64, 48], "counts": [3072]}, "is of size [64, 48], its image [48, 64]"),
        ([[1, 2, 3, 4]], "not x and y of three points or more"),
        ("?", "neither polygons nor run lengths"),
    ],
)
def test_an_object_whose_mask_makes_no_sense_is_left_out_and_told(
    detector, coco, tmp_path, segmentation, told
):
    content = json.loads(coco.read_text())
    content["annotations"][1]["segmentation"] = segmentation
    coco.write_text(json.dumps(content))
    report = evaluate_perception(detector, coco, tmp_path / "out", max_detections=2)
    (fault,) = report.faults
    assert "annotations[1], id 2: " in fault
    assert told in fault
    assert report.bad_images == []
    assert report.result["masks"].classes["cat"].objects == 1
    assert fault in (tmp_path / "out" / "report.md").read_text()


def test_an_object_without_a_category_spoils_its_image_alone(detector, coco, tmp_path):
    content = json.loads(coco.read_text())
    del content["annotations"][1]["category_id"]
    coco.write_text(json.dumps(content))
    report = evaluate_perception(detector, coco, tmp_path / "out", max_detections=2)
    ((entry, _, reason),) = report.bad_images
    assert (entry, reason) == (1, "an object of it has no category")


def test_data_that_name_no_classes_are_refused(detector, coco, tmp_path):
    content = json.loads(coco.read_text())
    del content["categories"]
    coco.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the data name no classes"):
        evaluate_perception(detector, coco, tmp_path / "out")


@pytest.mark.parametrize("form", ["list", "compressed"])
def test_run_lengths_and_crowds_are_scored(detector, coco, tmp_path, monkeypatch, form):
    """A crowd on which two objects are found: neither is wrong. All else is right."""
    content = json.loads(coco.read_text())
    for i, annotation in enumerate(content["annotations"]):
        mask = np.zeros((48, 64), bool)
        mask[6:36, 4 + i : 44 + i] = True
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"))) + 1
        counts = np.diff([0, *changes, mask.size]).tolist()
        annotation["segmentation"] = (
            encode_mask(mask) if form == "compressed" else {"size": [48, 64], "counts": counts}
        )
    content["annotations"][2]["iscrowd"] = 1
    coco.write_text(json.dumps(content))
    images = iter(range(3))
    model = knows(monkeypatch, detector, lambda **inputs: exact(i := next(images), 1 + i // 2))
    report = evaluate_perception(model, coco, tmp_path / "out")
    for kind in ("boxes", "masks"):
        assert report.result[kind].ap == pytest.approx(1)
        assert report.result[kind].classes["cat"].objects == 1


@pytest.fixture
def yolo(tmp_path):
    """The objects of `coco` as polygons, of the split val."""
    (tmp_path / "labels" / "val").mkdir(parents=True)
    for i in range(3):
        picture(tmp_path / "images" / "val" / f"{i}.png", value=60 * i)
        corners = [(4 + i) / 64, 6 / 48, (44 + i) / 64, 6 / 48, (44 + i) / 64, 36 / 48, (4 + i) / 64, 36 / 48]
        line = " ".join(map(str, [int(i > 0), *corners]))
        (tmp_path / "labels" / "val" / f"{i}.txt").write_text(line)
    (tmp_path / "data.yaml").write_text("names: [ant, cat]\nval: images/val\n")
    return tmp_path / "data.yaml"


def test_a_yolo_data_set_is_scored_as_a_coco_file_is(detector, yolo, tmp_path, monkeypatch):
    images = iter(range(3))
    model = knows(monkeypatch, detector, lambda **inputs: exact(next(images)))
    report = evaluate_perception(model, yolo, tmp_path / "out", split="val")
    assert report.result["boxes"].ap == pytest.approx(1)
    assert report.result["masks"].ap == pytest.approx(1)
    assert report.result["boxes"].classes["cat"].objects == 2
    assert "data.yaml, split val, 3 images" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "labels" / "val" / "1.txt").write_text("1 0.5 0.5 0.5 0.5")
    with pytest.raises(ValueError, match="data was"):
        evaluate_perception(model, yolo, tmp_path / "out", split="val")
    images = iter(range(3))
    report = evaluate_perception(model, yolo, tmp_path / "boxes", split="val")
    assert [*report.result] == ["boxes"]


def test_data_without_masks_are_scored_by_boxes(detector, coco, tmp_path):
    content = json.loads(coco.read_text())
    del content["annotations"][0]["segmentation"]
    coco.write_text(json.dumps(content))
    report = evaluate_perception(detector, coco, tmp_path / "out")
    assert [*report.result] == ["boxes"]
    assert report.remarks[-1] == "Masks are not scored: not every object of the data has one"


def test_a_segmenter_is_scored_by_the_names_of_classes(segmenter, maps, tmp_path, monkeypatch):
    """It says ant (0) on the left quarter, bee (1), which the data lack, right of it, and then cat (2)."""

    def forward(pixel_values, **inputs):
        logits = torch.zeros(1, 3, *pixel_values.shape[-2:])
        width = pixel_values.shape[-1]
        logits[:, 0, :, : width // 4] = 1
        logits[:, 1, :, width // 4 : width // 2] = 1
        logits[:, 2, :, width // 2 :] = 1
        return SegmenterOutput(logits=logits, image_sizes=torch.tensor([pixel_values.shape[-2:]]))

    model = knows(monkeypatch, segmenter, forward)
    report = evaluate_perception(model, maps, tmp_path / "out", images=maps.parent / "pictures")
    column = 47  # rows that are not ignored
    assert report.result.confusion.tolist() == [
        [64 * column, 0, 16 * column],
        [0, 32 * column, 16 * column],
    ]
    assert report.result.classes["cat"].iou == pytest.approx(64 / 80)
    assert report.result.classes["ant"].iou == pytest.approx(32 / 48)
    assert report.result.interval is not None
    assert "| ant | 2256 | 0.6667 | 0.6667 |" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "confusion.png").is_file()


def test_label_maps_without_names_or_images_are_refused(segmenter, maps, tmp_path):
    with pytest.raises(ValueError, match="of label maps, name the folder of their images too"):
        evaluate_perception(segmenter, maps, tmp_path / "out")
    (maps.parent / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"needs a list of classes: put classes\.json"):
        evaluate_perception(segmenter, maps, tmp_path / "out", images=maps.parent / "pictures")


def test_a_classifier_is_scored_by_the_names_of_folders(classifier, folders, tmp_path, monkeypatch):
    said = iter([[0.0, 1, 0], [0, 2, 9], [0, 1, 2]])
    model = knows(
        monkeypatch, classifier, lambda **inputs: SimpleNamespace(logits=torch.tensor([next(said)]))
    )
    report = evaluate_perception(model, folders, tmp_path / "out")
    assert report.result.top1 == pytest.approx(2 / 3)
    assert (report.result.k, report.result.top_k) == (3, 1)
    assert report.result.confusion.tolist() == [[1, 1, 0], [0, 1, 0]]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "There are 3 classes, so top-3 stands for top-5" in page


def test_a_classifier_that_is_sure_still_ranks_the_others(classifier, folders, tmp_path, monkeypatch):
    """Their probabilities are 0 in single precision."""
    logits = torch.tensor([[500.0, 1, 2]])
    model = knows(monkeypatch, classifier, lambda **inputs: SimpleNamespace(logits=logits))
    evaluate_perception(model, folders, tmp_path / "out", limit=1)
    (line,) = (tmp_path / "out" / "found.jsonl").read_text().splitlines()
    assert json.loads(line)["found"] == [2, 1, 0]  # ant, which the data lack, cat and bee


def test_images_go_through_the_processor_that_is_named(segmenter, maps, tmp_path, monkeypatch):
    shapes = []

    def forward(pixel_values, **inputs):
        shapes.append(tuple(pixel_values.shape[-2:]))
        size = torch.tensor([pixel_values.shape[-2:]])
        return SegmenterOutput(logits=torch.zeros(1, 3, *pixel_values.shape[-2:]), image_sizes=size)

    model, images = knows(monkeypatch, segmenter, forward), maps.parent / "pictures"
    other = StepwellSegmentationImageProcessor(short_side=96)
    evaluate_perception(model, maps, tmp_path / "own", images=images, limit=1)
    evaluate_perception(model, maps, tmp_path / "other", images=images, limit=1, processor=other)
    assert shapes == [(64, 85), (96, 128)]
    assert model.image_processor().short_side == 64
    with pytest.raises(ValueError, match="processor was"):
        evaluate_perception(model, maps, tmp_path / "own", images=images, limit=1, processor=other)


def test_a_run_goes_on_where_it_was_stopped(classifier, folders, tmp_path, monkeypatch):
    first = evaluate_perception(classifier, folders, tmp_path / "out", limit=2)
    lines = (tmp_path / "out" / "found.jsonl").read_text()
    (tmp_path / "out" / "found.jsonl").write_text(lines + '{"entry": 2, "fou')
    looked, done = [], []
    run = type(classifier).forward

    def counted(self, **inputs):
        looked.append(len(inputs["pixel_values"]))
        return run(self, **inputs)

    monkeypatch.setattr(type(classifier), "forward", counted)
    again = evaluate_perception(
        classifier, folders, tmp_path / "out", progress=lambda *count: done.append(count)
    )
    assert (looked, done) == ([1], [(3, 3)])
    assert (first.result.images, again.result.images) == (2, 3)
    assert (tmp_path / "out" / "found.jsonl").read_text().startswith(lines)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_detections": 3}, "max_detections was 2 and is 3"),
        ({"threshold": 0.5}, "threshold was 0.0 and is 0.5"),
    ],
)
def test_other_settings_are_refused(detector, coco, tmp_path, change, told):
    evaluate_perception(detector, coco, tmp_path / "out", max_detections=2, limit=1)
    with pytest.raises(ValueError, match=told):
        evaluate_perception(detector, coco, tmp_path / "out", **{"max_detections": 2, "limit": 1, **change})


def test_other_weights_and_classes_are_refused(classifier, folders, tmp_path):
    evaluate_perception(classifier, folders, tmp_path / "out", limit=1)
    weight = next(classifier.parameters())
    with torch.no_grad():
        weight += 1
        try:
            with pytest.raises(ValueError, match="weights was"):
                evaluate_perception(classifier, folders, tmp_path / "out", limit=1)
        finally:
            weight -= 1
    kept = classifier.config.id2label
    classifier.config.id2label = {0: "bee", 1: "ant", 2: "cat"}
    try:
        with pytest.raises(ValueError, match="config was"):
            evaluate_perception(classifier, folders, tmp_path / "out", limit=1)
    finally:
        classifier.config.id2label = kept


def test_a_run_does_not_go_on_with_other_files(detector, segmenter, coco, maps, tmp_path):
    options = {"images": tmp_path, "limit": 1}
    evaluate_perception(detector, coco, tmp_path / "boxes", **options)
    evaluate_perception(detector, coco, tmp_path / "boxes", **options)
    picture(tmp_path / "blank" / "images" / "0.png", value=255)
    with pytest.raises(ValueError, match="data was"):
        evaluate_perception(detector, coco, tmp_path / "boxes", images=tmp_path / "blank", limit=1)
    picture(tmp_path / "images" / "0.png", value=7)
    with pytest.raises(ValueError, match="data was"):
        evaluate_perception(detector, coco, tmp_path / "boxes", **options)
    evaluate_perception(segmenter, maps, tmp_path / "maps_out", images=tmp_path / "pictures", limit=1)
    Image.fromarray(np.full((48, 64), 5, np.uint8)).save(maps / "0.png")
    with pytest.raises(ValueError, match="data was"):
        evaluate_perception(segmenter, maps, tmp_path / "maps_out", images=tmp_path / "pictures", limit=1)


def test_a_run_does_not_go_on_with_other_statistics_of_the_model(segmenter, maps, tmp_path):
    options = {"images": tmp_path / "pictures", "limit": 1}
    evaluate_perception(segmenter, maps, tmp_path / "out", **options)
    mean = next(buffer for name, buffer in segmenter.named_buffers() if name.endswith("running_mean"))
    mean += 0.25
    try:
        with pytest.raises(ValueError, match="weights was"):
            evaluate_perception(segmenter, maps, tmp_path / "out", **options)
    finally:
        mean -= 0.25


def test_a_run_goes_on_with_a_model_that_was_moved(classifier, folders, tmp_path):
    classifier.save_pretrained(tmp_path / "here")
    for place in ("here", "there"):
        if place == "there":
            (tmp_path / "here").rename(tmp_path / "there")
        model = type(classifier).from_pretrained(tmp_path / place)
        evaluate_perception(model, folders, tmp_path / "out", limit=1)


def test_categories_of_no_object_need_not_be_the_models(detector, coco, tmp_path):
    content = json.loads(coco.read_text())
    content["categories"] += [{"id": 0, "name": "animals"}, {"id": 9, "name": "ant"}]
    coco.write_text(json.dumps(content))
    report = evaluate_perception(detector, coco, tmp_path / "out", images=tmp_path, limit=1)
    assert "The model does not know these, of which the data have nothing: animals" in report.remarks
    content["annotations"][0]["category_id"] = 0
    coco.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the model does not know 'animals'"):
        evaluate_perception(detector, coco, tmp_path / "again", images=tmp_path, limit=1)


def test_a_yolo_data_set_is_scored_on_its_validation_part(detector, yolo, tmp_path):
    picture(tmp_path / "images" / "train" / "9.png")
    yolo.write_text(f"{yolo.read_text()}train: images/train\n")
    (tmp_path / "labels" / "train").mkdir()
    (tmp_path / "labels" / "train" / "9.txt").write_text("1 0.5 0.5 0.5 0.5")
    assert evaluate_perception(detector, yolo, tmp_path / "out").images == 3
    assert "data.yaml, split val, 3 images" in (tmp_path / "out" / "report.md").read_text()
    assert evaluate_perception(detector, yolo, tmp_path / "train", split="train").images == 1
    yolo.write_text("names: [ant, cat]\ntrain: images/train\n")
    assert evaluate_perception(detector, yolo, tmp_path / "only").images == 1
    assert "data.yaml, split train, 1 images" in (tmp_path / "only" / "report.md").read_text()


def test_images_whose_size_the_file_does_not_tell_may_be_as_large_as_the_run_lets_in(
    detector, coco, tmp_path
):
    content = json.loads(coco.read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    coco.write_text(json.dumps(content))
    picture(tmp_path / "images" / "0.png", size=(40, 9000))
    limits = replace(stepwell.ImageLimits(), max_aspect=225.0)
    report = evaluate_perception(detector, coco, tmp_path / "out", images=tmp_path, limit=1, limits=limits)
    assert (report.faults, report.bad_images) == ([], [])
    assert report.result["boxes"].classes["ant"].objects == 1


def test_images_that_cannot_be_read_are_told_and_in_no_score(detector, coco, tmp_path):
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    report = evaluate_perception(detector, coco, tmp_path / "out", batch_size=3)
    ((entry, where, reason),) = report.bad_images
    assert (entry, report.images) == (1, 3)
    assert where.endswith("image 1.png (id 1)")
    assert reason
    assert report.result["boxes"].classes["cat"].objects == 1
    assert "- Bad images: 1 of 3" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_detections": 3}, "max_detections is of detectors"),
        ({"threshold": 0.0}, "a threshold is of detectors, got 0.0 for classification"),
        ({"tiles": stepwell.Tiles()}, "a classifier looks at whole images"),
        (
            {"images": "x", "classes": "x.json"},
            "is scored on a folder of images for every class, and .* maps",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(classifier, folders, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        evaluate_perception(classifier, folders, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_data_of_another_form_and_unknown_classes_are_refused(detector, classifier, folders, coco, tmp_path):
    scored_on = "is scored on a COCO file or a YOLO data set, and .* is a folder of images for every class"
    with pytest.raises(ValueError, match=scored_on):
        evaluate_perception(detector, folders, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a model for classification is scored .* is a COCO file"):
        evaluate_perception(classifier, coco, tmp_path / "out")
    picture(folders / "dog" / "0.png")
    with pytest.raises(ValueError, match="the model does not know 'dog' of the data"):
        evaluate_perception(classifier, folders, tmp_path / "out")


def test_the_command_looks_at_what_a_folder_holds(classifier, folders, tmp_path, capsys, monkeypatch):
    classifier.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "model", "photos", "--device", "cpu"]
    assert cli.main([*command, "--batch", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["score", "value", "95", "%", "interval"]
    assert out[-1] == "evaluations/model/photos-classification/report.md"
    told = json.loads((tmp_path / out[-1]).with_name("scores.json").read_text())
    assert told["model"]["name"] == "model"
    assert told["scores"]["top1"] == evaluate_perception(classifier, folders, tmp_path / "same").result.top1
    for name in ("val", "again"):
        shutil.copytree(folders, tmp_path / "splits" / name)
    assert cli.main(["evaluate", "model", "splits", "--split", "val", "--device", "cpu"]) == 0
    assert "evaluations/model/splits-val-classification/report.md" in capsys.readouterr().out
    (tmp_path / "bees.txt").write_text("cat\nbee\n")
    assert cli.main([*command, "--classes", "bees.txt", "--output", "ordered"]) == 0
    scores = json.loads((tmp_path / "ordered" / "scores.json").read_text())["scores"]
    assert [*scores["classes"]] == ["cat", "bee"]
    capsys.readouterr()
    for more, reason in (
        (["--metric", "exact"], "model is a model for classification, which is scored without --metric"),
        (["--suffix", "SHORT"], "--suffix says nothing about model; leave it out"),
        (["--max-new-tokens", "128"], "--max-new-tokens says nothing about model; leave it out"),
        (["--tiles"], "a classifier looks at whole images, and takes no tiles"),
        (["--tile-size", "64"], "--tile-size says how tiles are cut; add --tiles"),
    ):
        assert cli.main([*command, *more]) == 2
        assert capsys.readouterr().err == f"stepwell: {reason}\n"
    (folders / "bee" / "0.png").write_bytes(b"")
    assert cli.main([*command, "--output", "again"]) == 2
    assert "1 of 3 images are bad and in no score (all are in again/report.md)" in capsys.readouterr().err


def test_the_command_cuts_tiles_and_draws_the_best_and_the_worst(
    segmenter, maps, tmp_path, capsys, monkeypatch
):
    segmenter.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "model", "maps", "--images", "pictures", "--device", "cpu", "--output", "out"]
    cut = ["--tiles", "--tile-size", "32", "--tile-overlap", "0.5", "--tile-scale", "2"]
    assert cli.main([*command, *cut, "--pictures", "1"]) == 0
    settings = json.loads((tmp_path / "out" / "scores.json").read_text())["settings"]
    assert settings["tiles"] == {"size": 32, "overlap": 0.5, "scale": 2.0}
    for name in ("best", "worst"):
        assert (tmp_path / "out" / f"{name}.png").is_file()


def test_an_assistant_needs_a_metric_and_no_options_of_detectors(model_folder, write, capsys):
    data = write({"image": "0.png", "question": "?", "answers": ["a"]})
    assert cli.main(["evaluate", str(model_folder), str(data)]) == 2
    assert "is scored on questions: say how with --metric" in capsys.readouterr().err
    assert cli.main(["evaluate", str(model_folder), str(data), "--metric", "anls", "--threshold", "0.1"]) == 2
    assert "--threshold says nothing about" in capsys.readouterr().err
