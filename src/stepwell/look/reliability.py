"""Whether confidence means anything: answers that were equally sure, and how many of them were right.

Guo et al., arXiv 1706.04599, section 2: a reliability diagram, and the expected calibration error. Letters: n
answers, K bins of equal width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepwell.evaluate.drawing import check_drawing, write_figure

__all__ = ["Reliability", "draw_reliability", "reliability"]


class Reliability(NamedTuple):
    """What is in a bin: numbers of answers, means of their confidence and of how right they were, NaN where
    there is none.
    """

    edges: tuple[float, ...]  # (K + 1,), from 0 to 1; a bin holds its upper edge, and the first also 0
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    right: tuple[float, ...]
    error: float  # mean distance of the two, weighed by the numbers: the expected calibration error

    def as_json(self) -> dict[str, Any]:
        return {
            "answers": sum(self.counts),
            "expected_calibration_error": round(self.error, 4),
            "bins": [
                {"from": low, "to": high, "answers": count}
                | ({"confidence": round(sure, 4), "right": round(right, 4)} if count else {})
                for low, high, count, sure, right in zip(self.edges, self.edges[1:], *self[1:4], strict=False)
            ],
        }


def reliability(confidences: Sequence[float], right: Sequence[float], *, bins: int = 10) -> Reliability:
    """confidences (n,) in 0..1, right (n,): 1 for a right answer and 0 for a wrong one, or a score between.

    Raises ValueError for unequal numbers, for none, and for a confidence that is no probability.
    """
    sure, scores = np.asarray(confidences, float), np.asarray(right, float)
    if sure.shape != scores.shape or not sure.size or bins < 1:
        raise ValueError(
            f"each of at least one answer has a confidence and a score, and there is a bin; got {sure.size} "
            f"and {scores.size} in {bins} bins"
        )
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"a confidence is a probability, got {sure[~((sure >= 0) & (sure <= 1))][0]}")
    edges = np.linspace(0, 1, bins + 1)
    of_answer = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    counts = np.bincount(of_answer, minlength=bins)
    means = [
        np.divide(
            np.bincount(of_answer, weights=values, minlength=bins),
            counts,
            out=np.full(bins, np.nan),
            where=counts > 0,
        )
        for values in (sure, scores)
    ]
    error = float(np.nansum(counts * np.abs(means[0] - means[1])) / sure.size)
    return Reliability(
        tuple(edges.round(6).tolist()),
        tuple(counts.tolist()),
        tuple(means[0].tolist()),
        tuple(means[1].tolist()),
        error,
    )


def draw_reliability(path: Path, found: Reliability, *, title: str) -> None:
    """A PNG: the share of right answers against confidence, and how many answers each bin has. Raises
    ImportError without matplotlib.
    """
    check_drawing("a reliability curve")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    curve, numbers = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    kept = [i for i, count in enumerate(found.counts) if count]
    curve.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    curve.plot(
        [found.confidence[i] for i in kept], [found.right[i] for i in kept], marker="o", label="measured"
    )
    curve.set(title=title, ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1.02))
    curve.grid(alpha=0.3)
    curve.legend()
    width = found.edges[1] - found.edges[0]
    numbers.bar([edge + width / 2 for edge in found.edges[:-1]], found.counts, width=0.9 * width)
    numbers.set(xlabel="confidence: mean probability of an answer's tokens", ylabel="answers")
    write_figure(path, figure)
