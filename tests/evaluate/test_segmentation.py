"""Scores of label maps, against a matrix made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepwell.evaluate.segmentation import SegmentationScores, confusion_of_pixels

CLASSES = ["road", "water", "tree", "absent"]
TRUTH = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 255], [2, 2, 255, 255]])
FOUND = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 3], [1, 0, 2, 2]])
MATRIX = np.array([[3, 1, 0, 0], [1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_scores_are_those_of_the_matrix_made_by_hand():
    scores = SegmentationScores(CLASSES)
    scores.add(TRUTH, FOUND)
    result = scores.result()
    assert (result.confusion == MATRIX).all()
    assert {name: one.iou for name, one in result.classes.items()} == {
        "road": pytest.approx(3 / 6),
        "water": pytest.approx(2 / 5),
        "tree": 0,
        "absent": None,
    }
    assert [one.accuracy for one in result.classes.values()] == [3 / 4, pytest.approx(2 / 3), 0, None]
    assert [one.pixels for one in result.classes.values()] == [4, 3, 2, 0]
    assert result.mean_iou == pytest.approx((3 / 6 + 2 / 5 + 0) / 3)
    assert result.mean_accuracy == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)
    assert result.pixel_accuracy == pytest.approx(5 / 9)
    assert (result.images, result.interval) == (1, None)


def test_one_matrix_is_over_all_images_not_a_mean_of_theirs():
    scores = SegmentationScores(CLASSES)
    scores.add(TRUTH[:1], FOUND[:1])
    scores.add(TRUTH[1:], FOUND[1:])
    result = scores.result()
    assert (result.confusion == MATRIX).all()
    assert result.mean_iou == pytest.approx((3 / 6 + 2 / 5 + 0) / 3)
    first, second = (3 / 4 + 0) / 2, (0 + 2 / 4 + 0) / 3  # of one of the images, drawn twice
    assert result.interval == pytest.approx((min(first, second), max(first, second)))


def test_a_class_that_is_only_found_counts_and_one_that_the_data_lack_does_not():
    truth, found = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 1, 2]])
    scores = SegmentationScores(["a", "b"], has_others=True)
    scores.add(truth, found)
    result = scores.result()
    assert [one.iou for one in result.classes.values()] == [0.5, 0]
    assert result.mean_iou == 0.25
    assert result.mean_accuracy == 0.5
    assert result.confusion.tolist() == [[2, 1, 1], [0, 0, 0]]


def test_nothing_but_ignored_pixels_has_no_score():
    scores = SegmentationScores(CLASSES)
    scores.add(torch.full((2, 2), 255), FOUND[:2, :2])
    result = scores.result()
    assert (result.mean_iou, result.mean_accuracy, result.pixel_accuracy) == (None, None, None)


def test_resamples_in_which_nothing_counts_are_left_out_of_the_interval():
    scores = SegmentationScores(CLASSES)
    for _ in range(3):
        scores.add(torch.full((2, 2), 255), FOUND[:2, :2])
    assert scores.result().interval is None
    scores.add(FOUND, FOUND)
    assert scores.result().interval == (1.0, 1.0)


def test_labels_in_bytes_do_not_overflow():
    labels = torch.arange(150, dtype=torch.uint8).view(10, 15)
    matrix = confusion_of_pixels(labels, labels, (150, 150))
    assert (matrix == torch.eye(150)).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"of one size, got \(3, 4\) and \(1, 4\)"):
        confusion_of_pixels(TRUTH, FOUND[:1], (4, 4))
    with pytest.raises(ValueError, match="true labels are 0 to 1, got 0 to 2"):
        confusion_of_pixels(TRUTH, FOUND, (2, 4))
    with pytest.raises(ValueError, match="found labels are 0 to 0, got 0 to 1"):
        confusion_of_pixels(TRUTH, FOUND, (4, 1))
    with pytest.raises(ValueError, match=r"matrix of an image is \(4, 4\), got \(2, 2\)"):
        SegmentationScores(CLASSES).add_matrix(np.zeros((2, 2), int))


@pytest.mark.cuda
def test_a_gpu_counts_the_same():
    assert (confusion_of_pixels(TRUTH.cuda(), FOUND.cuda(), (4, 4)).cpu().numpy() == MATRIX).all()
