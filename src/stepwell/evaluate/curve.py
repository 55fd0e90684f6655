"""Scores against what vision costs, as pictures: of one model at several sizes, and of several systems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepwell.evaluate.compare import Compared, measured, measures_of
from stepwell.evaluate.drawing import check_drawing, plain, write_figure
from stepwell.evaluate.sweep import Point

__all__ = ["draw_compared", "draw_sweep"]


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
        [max(score - low, 0.0) for score, (low, _) in zip(scores, intervals, strict=True)],  # rounding
        [max(high - score, 0.0) for score, (_, high) in zip(scores, intervals, strict=True)],
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


def draw_compared(path: Path, systems: Sequence[Compared], *, metric: str) -> None:
    """A PNG with a panel for each measure of the metric. Raises as `check_drawing`."""
    check_drawing("a comparison")
    from matplotlib.figure import Figure

    measures = measures_of(metric)
    figure = Figure(figsize=(6 * len(measures), 4.5), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for system in systems:
            if system.report.scores is not None and system.costs.true_gflops is not None:
                place = system.costs.true_gflops, measured(system.report.scores, measure)
                axes.plot(*place, marker="o", linestyle="")
                axes.annotate(plain(system.name), place, textcoords="offset points", xytext=(6, 4))
        axes.set(xscale="log", xlabel="vision GFLOPs of what was seen, all operations", ylabel=measure)
        axes.margins(0.2)
        axes.grid(alpha=0.3)
    write_figure(path, figure)
