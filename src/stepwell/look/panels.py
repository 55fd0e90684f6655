"""A figure of panels: a picture, or a plain plane, with what lies over it, each under a title and beside a
scale. Drawn by matplotlib. Letters: (H, W) a grid, n points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from stepwell.evaluate.drawing import check_drawing, plain, write_figure
from stepwell.structures import Box

__all__ = ["MOST_PANELS", "Curve", "Panel", "chosen", "draw_panels"]

MOST_PANELS = 12
"""That are drawn, evenly chosen from all; the numbers of the others are told too."""
COLUMNS = 4
SIDE = 3.4
"""Inches of a panel."""
ROOM = 0.7
"""Of a panel's width, what a scale beside it leaves."""
SHOWN = 700
"""Pixels of the long side of a picture below others."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """picture: drawn below, in source pixels. heat (H, W): over `box`, told by a scale with `label`; over a
    picture the less of it the clearer, on `limits` where these are given. colours (H, W, 3): over `box`.
    points (n, 2), x and y, with weights (n,). marks: crosses. boxes: outlines, the first one thicker.
    borders: columns and rows, in the units of the axes, of lines over the box.
    """

    title: str
    picture: Image | None = None
    box: Box | None = None
    heat: Tensor | None = None
    limits: tuple[float, float] | None = None
    label: str = ""
    colours: Tensor | None = None
    points: Tensor | None = None
    weights: Tensor | None = None
    marks: Sequence[tuple[float, float]] = ()
    boxes: Sequence[Box] = ()
    borders: tuple[Sequence[float], Sequence[float]] = ((), ())
    axes: tuple[str, str] = ("x, pixels", "y, pixels")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """lines: label -> x and y."""

    title: str
    axes: tuple[str, str]
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)


def draw_panels(
    path: Path, title: str, panels: Sequence[Panel | Curve], *, columns: int | None = None
) -> None:
    """A figure of at most `MOST_PANELS`; columns: of panels, None as many as fit. Raises ImportError without
    matplotlib.
    """
    check_drawing("what a model sees")
    from matplotlib.figure import Figure

    kept = chosen(panels)
    if len(kept) < len(panels):
        title += f" ({len(kept)} of {len(panels)} drawn)"
    across = min(columns or COLUMNS, len(kept))
    down = math.ceil(len(kept) / across)
    tallest = min(max(map(_aspect, kept)), 2.5)
    height = max(ROOM * SIDE * tallest, 1.5) + 0.7  # a title above, numbers below
    figure = Figure(figsize=(max(SIDE * across, 5), height * down + 0.4), layout="constrained")
    figure.suptitle(plain(title))
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes, panel in zip(places, kept, strict=False):
        if isinstance(panel, Curve):
            _draw_curve(axes, panel)
        else:
            _draw_panel(figure, axes, panel)
    for axes in places[len(kept) :]:
        axes.set_axis_off()
    write_figure(path, figure)


def chosen(panels: Sequence[Panel | Curve]) -> list[Panel | Curve]:
    """At most `MOST_PANELS`, evenly, the first and the last among them."""
    if len(panels) <= MOST_PANELS:
        return list(panels)
    places = np.linspace(0, len(panels) - 1, MOST_PANELS).round().astype(int)
    return [panels[i] for i in places]


def _aspect(panel: Panel | Curve) -> float:
    if isinstance(panel, Curve):
        return 1.0
    left, top, right, bottom = _frame(panel)
    return (bottom - top) / max(right - left, 1e-9)


def _frame(panel: Panel) -> Box:
    if panel.picture is not None:
        return (0.0, 0.0, float(panel.picture.width), float(panel.picture.height))
    assert panel.box is not None
    return panel.box


def _draw_curve(axes: Any, curve: Curve) -> None:
    for label, (x, y) in curve.lines.items():
        axes.plot(x, y, label=plain(label))
    axes.set(title=plain(curve.title), xlabel=curve.axes[0], ylabel=curve.axes[1])
    axes.grid(alpha=0.3)
    if curve.lines:
        axes.legend(fontsize=7)


def _draw_panel(figure: Any, axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = _frame(panel)
    if panel.picture is not None:
        small = panel.picture.convert("L")
        small.thumbnail((SHOWN, SHOWN))
        axes.imshow(small, extent=(left, right, bottom, top), cmap="gray", vmin=0, vmax=255)
    over = panel.box or (left, top, right, bottom)
    extent = (over[0], over[2], over[3], over[1])
    if panel.colours is not None:
        axes.imshow(panel.colours.numpy(), extent=extent, interpolation="nearest")
    scale = None
    if panel.heat is not None:
        scale = _draw_heat(axes, panel, extent)
    if panel.points is not None and panel.weights is not None:
        x, y = panel.points.unbind(-1)
        most = max(float(panel.weights.max()), 1e-9)
        scale = axes.scatter(
            x, y, c=panel.weights, s=4 + 60 * panel.weights / most, cmap="viridis", vmin=0, vmax=most
        )
    if scale is not None:
        figure.colorbar(scale, ax=axes, label=panel.label, shrink=0.8, aspect=30).ax.tick_params(labelsize=6)
    for at in panel.borders[0]:
        axes.plot([at, at], [over[1], over[3]], color="tab:red", linewidth=0.6)
    for at in panel.borders[1]:
        axes.plot([over[0], over[2]], [at, at], color="tab:red", linewidth=0.6)
    for i, (x0, y0, x1, y1) in enumerate(panel.boxes):
        outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="tab:blue")
        outline.set_linewidth(1.5 if i == 0 else 0.5)
        axes.add_patch(outline)
    for place in panel.marks:
        axes.plot(*place, marker="x", color="tab:red", markersize=8, markeredgewidth=2)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_title(plain(panel.title), fontsize=8)
    axes.set_xlabel(panel.axes[0], fontsize=7)
    axes.set_ylabel(panel.axes[1], fontsize=7)
    axes.tick_params(labelsize=6)


def _draw_heat(axes: Any, panel: Panel, extent: tuple[float, float, float, float]) -> Any:
    assert panel.heat is not None
    values = panel.heat.float().numpy()
    known = values[np.isfinite(values)]
    low, high = panel.limits or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
    high = high if high > low else low + 1e-9
    options: dict[str, Any] = {"vmin": low, "vmax": high, "interpolation": "nearest"}
    if panel.picture is None:
        return axes.imshow(values, extent=extent, cmap="viridis", **options)
    clear = np.nan_to_num((values - low) / (high - low)).clip(0, 1)
    axes.imshow(values, extent=extent, cmap="autumn_r", alpha=0.85 * clear**0.5, **options)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), cmap="autumn_r")
