"""A sweep as a picture: score against size, and against the operations of the vision system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepwell.evaluate.drawing import check_drawing, write_figure
from stepwell.evaluate.sweep import Point

__all__ = ["draw_sweep"]


def draw_sweep(path: Path, points: Sequence[Point], *, name: str) -> None:
    """A PNG, with 95 % intervals; name: of the score. Raises as `check_drawing`."""
    check_drawing("a sweep")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_size, by_cost = figure.subplots(1, 2, sharey=True)
    scored = [(point, point.report.scores) for point in points if point.report.scores is not None]
    scores = [scores.score for _, scores in scored]
    intervals = [scores.interval or (scores.score, scores.score) for _, scores in scored]
    errors = [
        [score - low for score, (low, _) in zip(scores, intervals, strict=True)],
        [high - score for score, (_, high) in zip(scores, intervals, strict=True)],
    ]
    sizes = [point.size for point, _ in scored]
    costs = [point.true_gflops for point, _ in scored]
    for axes, places, label in (
        (by_size, sizes, "long side of the largest view, pixels"),
        (by_cost, costs, "vision GFLOPs of an image, all operations"),
    ):
        axes.errorbar(places, scores, yerr=errors, marker="o", capsize=3)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_size.set_xticks(sizes)
    by_size.set_ylabel(name)
    write_figure(path, figure)
