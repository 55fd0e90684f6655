"""How a stage went, as a figure beside its metrics: losses above, scores of the validation data below."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stepwell.evaluate.drawing import can_draw, check_drawing, write_figure
from stepwell.train.metrics import METRICS

__all__ = ["FIGURE", "Results", "draw_results", "read_metrics"]

FIGURE = "results.png"
Curve = tuple[Sequence[int], Sequence[float]]


class Results(TrainerCallback):
    """Draws metrics.csv anew behind every validation, and at the end; where matplotlib is not, nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def _draw(self, state: Any) -> None:
        if state.is_world_process_zero and can_draw():
            draw_results(self.folder / FIGURE, read_metrics(self.folder / METRICS))


def read_metrics(path: Path) -> dict[str, Curve]:
    """metrics.csv -> by name, the steps and the values."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if (
                len(row) == 4 and row[0].isdecimal()
            ):  # neither the names of columns nor one that was cut short
                step, _, name, value = row
                curves[name].append((int(step), float(value)))
    return {name: ([step for step, _ in of], [value for _, value in of]) for name, of in curves.items()}


def draw_results(path: Path, metrics: Mapping[str, Curve]) -> None:
    """A PNG. Raises ImportError without matplotlib."""
    check_drawing("how a training went")
    from matplotlib.figure import Figure

    losses = {name: curve for name, curve in metrics.items() if "loss" in name}
    scores = {
        name: curve for name, curve in metrics.items() if name.startswith("eval_") and name not in losses
    }
    panels = {name: curves for name, curves in (("losses", losses), ("scores", scores)) if curves}
    if not panels:
        return
    figure = Figure(figsize=(8, 3.5 * len(panels)), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for name, (steps, values) in curves.items():
            axes.plot(
                steps, values, label=name.removeprefix("eval_" if title == "scores" else ""), marker="."
            )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
    write_figure(path, figure)
