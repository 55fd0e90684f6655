"""From predictions to a score with its interval: the metrics by name, and the bootstrap over images.

Every metric turns a question into a few counts, the last of them 1, and a score is a function of their
totals. So a resample of the images is a weighted sum. Letters: N questions, T groups of them that are scored
apart and averaged (POPE's categories; else one), K counts, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepwell.evaluate import yes_no
from stepwell.evaluate.boxes import ENOUGH, box_iou, read_box
from stepwell.evaluate.captions import cider
from stepwell.evaluate.choices import choice
from stepwell.evaluate.metrics import anls, characters, exact, relaxed, spelled_alike
from stepwell.evaluate.rows import Row
from stepwell.evaluate.vqa import vqa_accuracy
from stepwell.evaluate.yes_no import Floats
from stepwell.structures import Box

__all__ = [
    "METRICS",
    "RESAMPLES",
    "Metric",
    "Scores",
    "check_row",
    "counts_of",
    "percentile_interval",
    "resampled",
    "scores_of",
]

RESAMPLES = 2000
SEED = 0

Count = Callable[[str, Row, bool], Sequence[float]]
"""(prediction, row, official) -> the counts (K,) of a question."""


def _share(column: int) -> Callable[[Floats], Floats]:
    """A mean over questions, of their totals (..., K)."""
    return lambda totals: totals[..., column] / totals[..., -1]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """measures: what is reported, of totals (..., K); the first is the score. by_type: types of questions are
    scored apart, and averaged.
    """

    about: str
    count: Count
    measures: Mapping[str, Callable[[Floats], Floats]]
    by_type: bool = False


def _mean(about: str, score: Callable[[str, Row, bool], float]) -> Metric:
    return Metric(about=about, count=lambda *asked: (score(*asked), 1.0), measures={"score": _share(0)})


def _answers(row: Row) -> tuple[str, ...]:
    if not row.answers:
        raise ValueError("it has no answers")
    return row.answers


def _answer(row: Row) -> str:
    if len(row.answers) != 1:
        raise ValueError(f"one answer is right, got {len(row.answers)}")
    return row.answers[0]


def _box(row: Row) -> Box:
    """Under `box`, or as the answer: a text, or four numbers."""
    box = row.box or read_box("".join(row.answers)) or read_box(f"[{','.join(row.answers)}]")
    if box is None:
        raise ValueError("it has no box, as [left, top, right, bottom]")
    return box


def _count_box(prediction: str, row: Row, official: bool) -> tuple[float, ...]:
    right, said = _box(row), read_box(prediction)
    iou = 0.0 if said is None else box_iou(said, right)
    return float(iou >= ENOUGH), iou, 1.0


def _unscored(prediction: str, row: Row, official: bool) -> float:
    """CIDEr is of all captions together (`counts_of`): a row alone is looked at, and not scored."""
    return 0.0 * len(_answers(row))


METRICS: Mapping[str, Metric] = {
    "exact": _mean(
        "equal text, whatever capitals, blanks and last dots",
        lambda said, row, official: exact(said, _answers(row), official=official),
    ),
    "anls": _mean(
        "ANLS, the similarity of text, 0 below a half",
        lambda said, row, official: anls(said, _answers(row), official=official),
    ),
    "reading": Metric(
        about="equal text, whatever capitals and blanks, and the share of characters that are right",
        count=lambda said, row, official: (
            spelled_alike(said, _answers(row)),
            characters(said, _answers(row)),
            1.0,
        ),
        measures={"exact": _share(0), "characters": _share(1)},
    ),
    "vqa": _mean(
        "VQA accuracy, the agreement with ten people",
        lambda said, row, official: vqa_accuracy(said, _answers(row), official=official),
    ),
    "relaxed": _mean(
        "relaxed accuracy, numbers within 5 %", lambda said, row, official: relaxed(said, _answers(row))
    ),
    "choice": _mean(
        "accuracy of letters",
        lambda said, row, official: choice(
            said, _answer(row), row.choices, official="scienceqa" if official else None
        ),
    ),
    "pope": Metric(
        about="POPE's F1, averaged over categories",
        count=lambda said, row, official: yes_no.pope_counts(said, _answer(row), official=official),
        measures=yes_no.MEASURES,
        by_type=True,
    ),
    "iou": Metric(
        about=f"share of boxes with an IoU of at least {ENOUGH}",
        count=_count_box,
        measures={f"accuracy_at_{ENOUGH}": _share(0), "mean_iou": _share(1)},
    ),
    "cider": _mean("CIDEr of captions", _unscored),
}


def check_row(metric: str, row: Row, *, official: bool = False) -> None:
    """Raises ValueError, or ZeroDivisionError where the official code does, for a row that lacks what the
    metric needs.
    """
    METRICS[metric].count("", row, official)


def counts_of(
    metric: str, predictions: Sequence[str], rows: Sequence[Row], *, official: bool = False
) -> Floats:
    """The counts (N, K) of all questions."""
    if metric == "cider":
        return np.array([(score, 1.0) for score in cider(predictions, [row.answers for row in rows])])
    count = METRICS[metric].count
    return np.array([count(said, row, official) for said, row in zip(predictions, rows, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of some questions. measures: by name, the score first. interval: of 95 %, None for a single image."""

    questions: int
    images: int
    measures: dict[str, float]
    interval: tuple[float, float] | None

    @property
    def score(self) -> float:
        return next(iter(self.measures.values()))


def scores_of(metric: str, counts: Floats, images: Sequence[Hashable], types: Sequence[str]) -> Scores:
    """counts (N, K), and the image and the type of each question -> the measures, and the 95 % percentile
    interval of the score over resamples of the images, each with all of its questions, which are not
    independent.
    """
    kind = METRICS[metric]
    groups = sorted(set(types)) if kind.by_type else [""]
    apart = np.zeros((len(counts), len(groups), counts.shape[1]))
    apart[range(len(counts)), [groups.index(name) if kind.by_type else 0 for name in types]] = counts
    names = list(dict.fromkeys(images))
    place = {name: i for i, name in enumerate(names)}
    of_images = np.zeros((len(names), *apart.shape[1:]))
    np.add.at(of_images, [place[image] for image in images], apart)
    measures = {name: float(_averaged(measure, of_images.sum(0))) for name, measure in kind.measures.items()}
    interval = None
    if len(names) > 1:
        score = next(iter(kind.measures.values()))
        interval = percentile_interval(_averaged(score, resampled(of_images)))
    return Scores(questions=len(counts), images=len(names), measures=measures, interval=interval)


def resampled(of_images: Floats) -> Floats:
    """Counts (images, ...) -> totals (R, ...) over as many images, drawn with replacement."""
    draw, size = np.random.default_rng(SEED), len(of_images)
    totals = np.empty((RESAMPLES, *of_images.shape[1:]))
    for total in totals:
        times = np.bincount(draw.integers(size, size=size), minlength=size)
        total[...] = np.tensordot(times, of_images, 1)
    return totals


def percentile_interval(values: Floats) -> tuple[float, float]:
    """Of 95 %: scores (R,) of resamples -> their percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _averaged(measure: Callable[[Floats], Floats], totals: Floats) -> Floats:
    """Totals (..., T, K) -> the mean of a measure over the groups that have questions."""
    has_some = totals[..., -1] > 0
    values = np.where(has_some, measure(np.where(has_some[..., None], totals, 1.0)), 0.0)
    mean: Floats = values.sum(-1) / has_some.sum(-1)
    return mean
