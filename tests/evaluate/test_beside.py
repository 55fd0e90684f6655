"""How well images are understood, and the sheets of the best and of the worst."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from stepwell.evaluate import beside
from stepwell.evaluate.beside import draw_best_and_worst
from stepwell.evaluate.detection import TrueObjects, f1_of_boxes
from stepwell.evaluate.segmentation import SegmentationScores
from stepwell.evaluate.tasks import ClassificationTask, DetectionTask, SegmentationTask
from stepwell.images.limits import DEFAULT_LIMITS
from stepwell.models.predictions import Detections


def truth(*boxes, labels=None, crowd=None):
    return TrueObjects(
        boxes=np.array(boxes, float).reshape(-1, 4),
        labels=np.array(labels or [0] * len(boxes), int),
        is_crowd=None if crowd is None else np.array(crowd),
    )


def f1(boxes, true, labels=None, **settings):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return f1_of_boxes(boxes, np.array(labels or [0] * len(boxes), int), true, **settings)


A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 40, 60, 60]


def test_f1_of_what_is_found():
    assert f1([A, B], truth(A, B)) == 1
    assert f1([A], truth(A, B)) == pytest.approx(2 / 3)
    assert f1([A, B, C], truth(A)) == pytest.approx(2 / 4)
    assert f1([C], truth(A, B)) == 0


def test_where_there_is_nothing():
    assert f1([], truth()) == 1
    assert f1([A], truth()) == 0
    assert f1([], truth(A)) == 0


def test_a_box_is_of_its_class():
    assert f1([A], truth(A, labels=[1]), [0]) == 0
    assert f1([A, A], truth(A, A, labels=[1, 0]), [0, 1]) == 1


def test_an_object_is_found_once():
    assert f1([A, A], truth(A)) == pytest.approx(2 / 3)
    near = [1, 0, 11, 10]  # 90 of 110 shared with A
    assert f1([A, near], truth(A, near)) == 1
    assert f1([near, near], truth(A, near)) == 1  # the second box finds what is left


def test_the_first_box_that_overlaps_enough_finds_it():
    """A third of an object does not take it away from a better box."""
    assert f1([[5, 0, 15, 10], A], truth(A)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("right", "found"), [(20, 0.0), (19.9, 1.0)])
def test_an_overlap_is_more_than_a_half(right, found):
    assert f1([[0, 0, right, 10]], truth(A)) == found  # 100 of 10 * right
    assert f1([[0, 0, right, 10]], truth(A), overlap=0.4) == 1


def test_boxes_beside_one_another_share_nothing():
    assert f1([[-10, -10, -1, -1]], truth(A)) == 0  # both sides of what is shared are negative


def test_crowds_are_not_asked_for():
    assert f1([A], truth(A, B, crowd=[False, True])) == 1
    assert f1([B], truth(B, crowd=[True])) == 0


def detection(boxes, scores, labels, true, monkeypatch):
    monkeypatch.setattr("stepwell.evaluate.tasks.true_objects", lambda image, masks: true)
    task = SimpleNamespace(source=[None])
    return DetectionTask.quality(task, 0, {"boxes": boxes, "scores": scores, "labels": labels})


def test_a_detector_is_judged_by_the_boxes_that_it_draws(monkeypatch):
    assert detection([A, B], [0.9, 0.5], [0, 0], truth(A), monkeypatch) == 1
    assert detection([A, B], [0.9, 0.6], [0, 0], truth(A), monkeypatch) == pytest.approx(2 / 3)
    assert detection([B, A], [0.2, 0.9], [1, 0], truth(A), monkeypatch) == 1
    assert detection([], [], [], truth(), monkeypatch) == 1


def test_the_boxes_by_which_a_detector_is_judged_are_those_that_are_drawn(monkeypatch):
    """A run keeps what scores far lower, for the curve of precision."""
    found = Detections(
        boxes=torch.tensor([A, B, C]).float(),
        scores=torch.tensor([0.9, 0.5, 0.1]),
        labels=torch.tensor([0, 1, 1]),
        class_names=("ant", "bee"),
        image_size=(100, 100),
    )
    monkeypatch.setattr(DetectionTask, "predicted", lambda self, images: [found for _ in images])
    task = DetectionTask.__new__(DetectionTask)
    assert task.shown(Image.new("RGB", (100, 100))).scores.tolist() == found.scores[:1].tolist()


def test_a_segmenter_is_judged_by_the_mean_iou_of_an_image():
    task = SimpleNamespace(classes=SimpleNamespace(names=("a", "b"), others=()), shape=(2, 2))
    task.result = lambda found: SegmentationTask.result(task, found)
    found = [[0, 0, 30], [0, 1, 10], [1, 1, 60]]
    assert SegmentationTask.quality(task, 3, found) == pytest.approx((30 / 40 + 60 / 70) / 2)
    assert SegmentationTask.quality(task, 3, []) == 0
    assert SegmentationScores(("a", "b"), ignored=255).result().mean_iou is None


@pytest.mark.parametrize(("label", "quality"), [(4, 1), (2, 1 / 2), (0, 1 / 3), (1, 0)])
def test_a_classifier_is_judged_by_the_place_of_the_truth(label, quality):
    task = SimpleNamespace(source=[SimpleNamespace(label=label)])
    assert ClassificationTask.quality(task, 0, [4, 2, 0]) == pytest.approx(quality)


class Task:
    """Images whose quality is said by what is found in them."""

    name = "classification"

    def __init__(self, folder, count):
        self.source, self.folder, self.drawn = Source(folder, count), folder, []

    def image(self, index):
        return self.folder / f"{index}.png"

    def quality(self, index, found):
        return found

    def shown(self, image):
        def draw(image):
            self.drawn.append(image.getpixel((0, 0))[0] // 10)
            return image

        return SimpleNamespace(draw=draw)


class Source(list):
    limits = DEFAULT_LIMITS

    def __init__(self, folder, count):
        super().__init__(range(count))
        for i in range(count):
            Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(folder / f"{i}.png")


@pytest.fixture
def painted(monkeypatch):
    """Captions beside what is found; the truth of each image is a panel of its own."""
    told = []

    def captioned(image, text, size):
        told.append((text, size))
        return image

    monkeypatch.setattr(beside, "captioned", captioned)
    panel = Image.new("RGB", (40, 30))
    monkeypatch.setattr(beside, "SamplePainter", lambda source: lambda sample: SimpleNamespace(panel=panel))
    return told


def test_sheets_of_the_best_and_of_the_worst(tmp_path, painted):
    """Of equals the first comes first; the worst begin with the worst."""
    task = Task(tmp_path, 5)
    draw_best_and_worst(tmp_path, task, {0: 0.5, 1: 1.0, 2: 0.0, 3: 0.5, 4: 0.25}, 3)
    assert task.drawn == [1, 0, 3, 2, 4, 3]
    assert painted[0] == ("found, 1.00", (30, 40))
    assert painted[4][0] == "found, 0.25"
    with Image.open(tmp_path / "best.png") as best:
        assert best.size[0] >= 4 * 40  # two images a row, each beside its truth
        assert best.size[1] >= 2 * 30


def test_fewer_images_than_are_asked_for(tmp_path, painted):
    task = Task(tmp_path, 1)
    draw_best_and_worst(tmp_path, task, {0: 0.5}, 10)
    assert task.drawn == [0, 0]
    assert (tmp_path / "worst.png").is_file()
    draw_best_and_worst(tmp_path / "none", task, {}, 10)
    assert not (tmp_path / "none").exists()
