"""Scores of classifiers, by hand."""

from __future__ import annotations

import pytest

from stepwell.evaluate.classification import ClassificationScores

CLASSES = list("abcdefg")


def test_top_1_and_top_5_and_the_matrix_by_hand():
    scores = ClassificationScores(CLASSES)
    scores.add(0, [0, 1, 2, 3, 4, 5, 6])
    scores.add(0, [1, 2, 3, 4, 0, 5, 6])  # the fifth
    scores.add(1, [2, 3, 4, 5, 6, 1, 0])  # the sixth
    scores.add(1, [1, 0, 2, 3, 4, 5, 6])
    result = scores.result()
    assert (result.images, result.k) == (4, 5)
    assert (result.top1, result.top_k) == (0.5, 0.75)
    assert [one.top1 for one in result.classes.values()] == [0.5, 0.5, *[None] * 5]
    assert result.classes["a"].images == 2
    assert (result.confusion[0, 0], result.confusion[0, 1], result.confusion[1, 2]) == (1, 1, 1)
    assert result.confusion.sum() == 4
    (low, high), (low5, high5) = result.intervals
    assert 0 <= low < 0.5 < high <= 1
    assert 0 < low5 < 0.75 < high5 == 1


def test_fewer_classes_than_five_are_the_k_of_top_k():
    scores = ClassificationScores(CLASSES[:3])
    scores.add(2, [0, 1, 2])
    result = scores.result()
    assert (result.k, result.top1, result.top_k, result.intervals) == (3, 0, 1, None)
    assert ClassificationScores(CLASSES[:3], num_others=1).k == 4
    assert ClassificationScores(CLASSES[:3]).result().top1 is None


def test_a_class_that_the_data_lack_is_wrong_and_has_a_column():
    scores = ClassificationScores(CLASSES[:2], num_others=3)
    scores.add(1, [2, 2, 1, 2, 0])
    result = scores.result()
    assert result.confusion.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert (result.top1, result.top_k) == (0, 1)


def test_labels_that_there_are_not_are_refused():
    scores = ClassificationScores(CLASSES)
    with pytest.raises(ValueError, match="labels are 0 to 6, got 7"):
        scores.add(7, range(5))
    with pytest.raises(ValueError, match=r"ranked are 5 labels of 0 to 6, got \[0, 1, 2, 3, 9\]"):
        scores.add(0, [0, 1, 2, 3, 9])
    with pytest.raises(ValueError, match="ranked are 5 labels"):
        scores.add(0, [0, 1])
