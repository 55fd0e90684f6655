"""Scores of classifiers: how often the right class is the first that is named, or among the first five.

Letters: N images, K classes of the data, K' = K, or K + 1 where a model may name a class that the data lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepwell.evaluate.scoring import percentile_interval, resampled
from stepwell.models.predictions import TOP

__all__ = ["ClassAccuracy", "ClassificationResult", "ClassificationScores"]


Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """Of one class. top1: None where it has no images."""

    images: int
    top1: float | None


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """0 to 1, None without images. k: of top_k, five, or as many classes as a model may name. intervals: of
    95 %, of top1 and top_k, over resamples of the images; None for a single one. confusion: (K, K'), rows are
    what images show.
    """

    images: int
    k: int
    top1: float | None
    top_k: float | None
    intervals: tuple[tuple[float, float], tuple[float, float]] | None
    classes: dict[str, ClassAccuracy]
    confusion: Counts


class ClassificationScores:
    """Collects images. classes: names, in the order of labels. num_others: classes that a model may name and
    the data lack, all of which have the label K.
    """

    def __init__(self, classes: Sequence[str], *, num_others: int = 0) -> None:
        self.classes = tuple(classes)
        self.k = min(TOP, len(self.classes) + num_others)
        self._matrix: Counts = np.zeros((len(self.classes), len(self.classes) + bool(num_others)), np.int64)
        self._hits: list[tuple[float, float]] = []

    def add(self, label: int, ranked: Sequence[int]) -> None:
        """label: of the right class. ranked: labels that a model names, the best first, `k` of them or more.

        Raises ValueError for too few, and for labels that there are not.
        """
        count, named = self._matrix.shape
        best = [int(place) for place in ranked[: self.k]]
        if len(best) < self.k or not all(0 <= place < named for place in best):
            raise ValueError(f"ranked are {self.k} labels of 0 to {named - 1}, got {list(ranked)}"[:200])
        if not 0 <= label < count:
            raise ValueError(f"labels are 0 to {count - 1}, got {label}")
        self._matrix[label, best[0]] += 1
        self._hits.append((float(best[0] == label), float(label in best)))

    def result(self) -> ClassificationResult:
        hits = np.array(self._hits).reshape(-1, 2)
        number = len(hits)
        intervals = None
        if number > 1:
            shares = resampled(hits) / number
            intervals = percentile_interval(shares[:, 0]), percentile_interval(shares[:, 1])
        of_class = self._matrix.sum(1)
        return ClassificationResult(
            images=number,
            k=self.k,
            top1=float(hits[:, 0].mean()) if number else None,
            top_k=float(hits[:, 1].mean()) if number else None,
            intervals=intervals,
            classes={
                name: ClassAccuracy(
                    images=int(of_class[i]),
                    top1=float(self._matrix[i, i] / of_class[i]) if of_class[i] else None,
                )
                for i, name in enumerate(self.classes)
            },
            confusion=self._matrix.copy(),
        )
