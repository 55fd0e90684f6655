"""Scores of perception as pictures: precision against recall, and which class is taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.evaluate.drawing import check_drawing, plain, write_figure

__all__ = ["draw_confusion", "draw_precision"]

MOST_NUMBERS, MOST_NAMES = 15, 60
"""Classes up to which every cell tells its share, and every row its name."""


def draw_precision(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A PNG, a panel for each of what is scored ("boxes", "masks") with its curves: name -> precision at
    recalls spread evenly from 0 to 1. Raises ImportError without matplotlib.
    """
    check_drawing("precision and recall")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (kind, of_kind) in zip(panels, curves.items(), strict=True):
        for name, precision in of_kind.items():
            axes.plot(np.linspace(0, 1, len(precision)), precision, label=plain(name))
        axes.set(title=kind, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if of_kind:
            axes.legend()
    write_figure(path, figure)


def draw_confusion(
    path: Path, matrix: np.ndarray[Any, np.dtype[np.int64]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """A PNG of counts (rows, columns), each as the share of its row, which is what things are. Of many
    classes some names are left out. Raises ImportError without matplotlib.
    """
    check_drawing("a confusion matrix")
    from matplotlib.figure import Figure

    total = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    side = min(max(4.5, 0.42 * max(matrix.shape)), 16)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    size = 8 if len(rows) <= 30 else 6
    for names, put, turned in ((columns, axes.set_xticks, 90), (rows, axes.set_yticks, 0)):
        step = -(-len(names) // MOST_NAMES)
        places = range(0, len(names), step)
        put(places, [_short(names[place]) for place in places], rotation=turned, fontsize=size)
    if max(matrix.shape) <= MOST_NUMBERS:
        for i, k in np.ndindex(*matrix.shape):
            if matrix[i, k]:
                colour = "white" if shares[i, k] > 0.5 else "black"
                axes.text(k, i, f"{shares[i, k]:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set(xlabel="found", ylabel="true")
    write_figure(path, figure)


def _short(name: str) -> str:
    return plain(name if len(name) <= 24 else f"{name[:22]}...")
