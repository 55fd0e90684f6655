"""Figures are drawn for any number of classes, and are there whole."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from stepwell.evaluate.charts import draw_confusion, draw_precision


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.mark.parametrize(("count", "names", "cells"), [(2, 2, 2), (20, 20, 0), (150, 50, 0)])
def test_a_confusion_matrix_is_readable(tmp_path, drawn, count, names, cells):
    rows = [f"class {i}" for i in range(count)]
    draw_confusion(tmp_path / "confusion.png", np.diag(np.arange(1, count + 1)), rows, [*rows])
    (figure,) = drawn
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == rows[:: count // names]
    assert [text.get_text() for text in axes.texts] == ["1.00"] * cells
    assert axes.images[0].get_array().trace() == count  # shares of rows
    assert max(Image.open(tmp_path / "confusion.png").size) < 3000
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


@pytest.mark.parametrize("name", ["$\\frac$", "$a_b$", "cost $", "a_b^c"])
def test_names_are_no_formulas(tmp_path, drawn, name):
    draw_confusion(tmp_path / "confusion.png", np.eye(2, dtype=int), [name, "b"], [name, "b"])
    draw_precision(tmp_path / "precision.png", {"boxes": {name: [1.0, 0.5]}})
    told = [*drawn[0].axes[0].get_yticklabels(), *drawn[1].axes[0].get_legend().get_texts()]
    assert [text.get_text().replace(r"\$", "$") for text in told] == [name, "b", name]


def test_a_class_without_anything_and_a_column_of_others_are_drawn(tmp_path, drawn):
    draw_confusion(tmp_path / "c.png", np.array([[1, 0, 3], [0, 0, 0]]), ["a", "b"], ["a", "b", "other"])
    assert drawn[0].axes[0].images[0].get_array().tolist() == [[0.25, 0, 0.75], [0, 0, 0]]


def test_every_curve_is_drawn_against_recall(tmp_path, drawn):
    curves = {"boxes": {"IoU 0.50": [1, 0.5, 0]}, "masks": {}}
    draw_precision(tmp_path / "pr_curve.png", curves)
    boxes, masks = drawn[0].axes
    (line,) = boxes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 0.5, 1], [1, 0.5, 0])
    assert (boxes.get_title(), masks.get_title(), len(masks.lines)) == ("boxes", "masks", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["pr_curve.png"]
