"""Scores and their intervals, against direct computations."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from stepwell.commands.evaluate import MetricName
from stepwell.evaluate.rows import Row
from stepwell.evaluate.scoring import METRICS, RESAMPLES, check_row, counts_of, scores_of


def row(entry=0, **fields):
    return Row(entry=entry, where="", images=(Path("a"),), names=("a",), question="?", **fields)


def test_the_command_knows_all_metrics():
    assert get_args(MetricName) == tuple(METRICS)


@pytest.mark.parametrize(
    ("metric", "fields", "right", "wrong"),
    [
        ("exact", {"answers": ("a", "b")}, "B.", "c"),
        ("anls", {"answers": ("abcd",)}, "ABCD", "x"),
        ("reading", {"answers": ("RM 8.50", "8.50")}, "rm8.5 0", "8.51"),
        ("vqa", {"answers": ("2",) * 10}, "two", "3"),
        ("relaxed", {"answers": ("100",)}, "104", "106"),
        ("choice", {"answers": ("fox",), "choices": ("dog", "fox")}, "B.", "A"),
        ("pope", {"answers": ("no",)}, "No!", "yes"),
        ("iou", {"answers": ("[0, 0, 1, 1]",)}, "[0, 0, 1, 0.5]", "[0, 0, 1, 0.4]"),
        ("iou", {"answers": ("0", "0", "1", "1")}, "[0, 0, 1, 0.5]", "[0, 0, 1, 0.4]"),
        ("iou", {"answers": ("x",), "box": (0.0, 0.0, 1.0, 1.0)}, "[0, 0, 1, 0.5]", "no"),
    ],
)
def test_a_prediction_is_right_or_wrong(metric, fields, right, wrong):
    names = [*METRICS[metric].measures]
    name = "accuracy" if metric == "pope" else names[0]
    for prediction, score in ((right, 1), (wrong, 0)):
        counts = counts_of(metric, [prediction], [row(**fields)])
        scores = scores_of(metric, counts, ["a"], [""])
        assert scores.measures[name] == score
        assert (scores.questions, scores.images, scores.interval) == (1, 1, None)


def test_official_bugs_are_asked_for():
    asked = row(answers=("no",))
    ours, theirs = (counts_of("pope", ["No!"], [asked], official=official) for official in (False, True))
    assert (ours[0, 3], theirs[0, 3]) == (1, 0)
    letter = row(answers=("B",), choices=("dog", "fox"))
    ours, theirs = (counts_of("choice", ["B."], [letter], official=official) for official in (False, True))
    assert (ours[0, 0], theirs[0, 0]) == (1, 0)
    blue = row(answers=("Blue",))
    ours, theirs = (counts_of("exact", ["Blue"], [blue], official=official) for official in (False, True))
    assert (ours[0, 0], theirs[0, 0]) == (1, 0)
    people = row(answers=("im",) * 10)
    ours, theirs = (counts_of("vqa", ["i'm"], [people], official=official) for official in (False, True))
    assert (ours[0, 0], theirs[0, 0]) == (1, 0)


def test_the_mean_overlap_of_boxes_is_told_beside_their_share():
    rows = [row(answers=(), box=(0.0, 0.0, 1.0, 1.0))] * 2
    counts = counts_of("iou", ["[0, 0, 1, 0.5]", "[0, 0, 1, 0.25]"], rows)
    assert scores_of("iou", counts, "ab", [""] * 2).measures == {"accuracy_at_0.5": 0.5, "mean_iou": 0.375}


@pytest.mark.parametrize(
    ("metric", "fields", "reason"),
    [
        ("vqa", {"answers": ("a",)}, "of 10 people, got 1"),
        ("choice", {"answers": ("x",), "choices": ("dog", "fox")}, "the right choice is A, B"),
        ("choice", {"answers": ("A", "B")}, "one answer is right, got 2"),
        ("pope", {"answers": ("maybe",)}, "yes or no"),
        ("iou", {"answers": ("x",)}, "it has no box"),
        ("cider", {"answers": (), "box": (0, 0, 1, 1)}, "it has no answers"),
        ("anls", {"answers": (), "box": (0, 0, 1, 1)}, "it has no answers"),
    ],
)
def test_a_row_without_what_a_metric_needs_is_refused(metric, fields, reason):
    with pytest.raises(ValueError, match=reason):
        check_row(metric, row(**fields))


def test_the_interval_is_that_of_drawn_images_with_all_their_questions():
    """Drawn here image by image; five images of one to five questions."""
    data = np.random.default_rng(7)
    images = [name for name, count in zip("abcde", (1, 2, 3, 4, 5), strict=True) for _ in range(count)]
    values = data.random(len(images))
    of_image = {name: [v for v, i in zip(values, images, strict=True) if i == name] for name in "abcde"}
    draw = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = [value for i in draw.integers(5, size=5) for value in of_image["abcde"[i]]]
        means.append(np.mean(drawn))
    counts = np.stack([values, np.ones(len(values))], 1)
    scores = scores_of("anls", counts, images, [""] * len(images))
    assert scores.score == pytest.approx(values.mean())
    assert scores.interval == pytest.approx(np.percentile(means, [2.5, 97.5]))
    alone = scores_of("anls", counts, range(len(images)), [""] * len(images))
    assert alone.interval != scores.interval


def test_categories_of_pope_are_scored_apart_and_averaged():
    rows = [row(answers=(answer,)) for answer in ("yes", "no", "yes", "yes", "no")]
    said, types = ["yes", "yes", "no", "yes", "no"], ["random", "random", "popular", "popular", "popular"]
    scores = scores_of("pope", counts_of("pope", said, rows), "abcde", types)
    assert scores.score == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores.measures["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.measures["yes_ratio"] == pytest.approx((1 + 1 / 3) / 2)
    pooled = scores_of("pope", counts_of("pope", said, rows), "abcde", [""] * 5)
    assert pooled.measures["accuracy"] == pytest.approx(3 / 5)


def test_a_category_that_a_resample_lacks_is_left_out_of_its_mean():
    """All right: each resample scores 1, also those with one of the two categories alone."""
    rows = [row(answers=("yes",))] * 4
    scores = scores_of("pope", counts_of("pope", ["yes"] * 4, rows), "abcd", ["a", "a", "a", "b"])
    assert scores.interval == (1, 1)
