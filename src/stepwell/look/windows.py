"""Windows and views, as the encoders have them.

Windows of LLaVA-UHD (arXiv 2412.13871, section 3.2): each query reads its own part of a view, on every level.
Windows of vision transformers: cells attend within squares from the top left. Views are drawn as `stepwell
ask --show` draws them. Letters: (h, w) the size of a view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepwell.encoders.vit import VisionTransformer
from stepwell.fuse.windows import WindowAttention
from stepwell.look.numbers import listed
from stepwell.look.panels import Curve, Panel, draw_panels
from stepwell.look.shown import Shown
from stepwell.look.subject import Subject
from stepwell.structures import View
from stepwell.views.sheet import write_views

__all__ = ["show_views", "show_windows", "write_view_figure"]


def show_windows(subject: Subject) -> Shown:
    """Borders of windows over the picture, view by view. Raises ValueError for a model without windows."""
    panels: list[Panel | Curve] = []
    numbers: list[dict[str, Any]] = []
    projector: Any = getattr(subject.network, "projector", None)
    if isinstance(projector, WindowAttention):
        maps = subject.look()
        for number, view in enumerate(subject.views):
            of_view = maps[number * len(projector.levels) : (number + 1) * len(projector.levels)]
            sizes = [(one.map.shape[-2], one.map.shape[-1]) for one in of_view]
            coarsest = sizes[0][0] >> projector.levels[0], sizes[0][1] >> projector.levels[0]
            levels = [
                {"level": level, "cells": size, "bins": projector.bins(coarsest, level)}
                for level, size in zip(projector.levels, sizes, strict=True)
            ]
            rows, cols = projector.config.grid
            panels.append(_panel(subject, view, f"{cols} x {rows} windows", cols, rows))
            numbers.append({"view": view.name, "box": listed(view.box), "windows": [rows, cols]})
            numbers[-1]["levels"] = levels
    for encoder, order in zip(subject.encoders, subject.order, strict=True):
        windows = encoder.windows if isinstance(encoder, VisionTransformer) else ()
        for number in order:
            for side in sorted(set(windows) - {0}):
                view = subject.views[number]
                down, across = (cells / side for cells in view.grid)
                panels.append(_panel(subject, view, f"windows of {side} x {side} cells", across, down))
                layers = [i for i, window in enumerate(windows) if window == side]
                numbers.append({"view": view.name, "box": listed(view.box), "side": side, "layers": layers})
    if not panels:
        raise ValueError(
            f"{subject.name} has no windows: neither queries that read them nor vision transformers with any"
        )
    return Shown(f"{subject.name}: windows", panels, {"windows": numbers})


def _panel(subject: Subject, view: View, what: str, cols: float, rows: float) -> Panel:
    """cols, rows: of windows across and down a view, the last of which may be cut off."""
    left, top, right, bottom = view.box
    borders = (
        [left + (right - left) * i / cols for i in range(int(np.ceil(cols)))] + [right],
        [top + (bottom - top) * i / rows for i in range(int(np.ceil(rows)))] + [bottom],
    )
    title = f"{view.name} {view.size[1]} x {view.size[0]}, {what}"
    return Panel(title=title, picture=subject.picture, box=view.box, borders=borders)


def show_views(subject: Subject) -> Shown:
    """What the encoders are given, each view in its own pixels."""
    panels: list[Panel | Curve] = []
    numbers = []
    for view, tensor in zip(subject.views, subject.tensors, strict=True):
        height, width = view.size
        colours = _colours(tensor, subject)
        title = f"{view.name} {width} x {height}, {view.grid[1]} x {view.grid[0]} cells"
        panels.append(Panel(title=title, box=(0.0, 0.0, float(width), float(height)), colours=colours))
        numbers.append(
            {"view": view.name, "size": view.size, "grid": view.grid, "box": listed(view.box)}
            | ({"maps": view.maps} if view.maps else {})
        )
    told: dict[str, Any] = {"views": numbers}
    if subject.layout is not None:
        told |= {"visual_tokens": subject.layout.num_visual, "tiles": subject.layout.tiles}
    return Shown(f"{subject.name}: views", panels, told)


def write_view_figure(path: Path, subject: Subject, shown: Shown) -> None:
    """Of an assistant the sheet of `--show`, of others the panels."""
    if subject.assistant is None:
        draw_panels(path, shown.title, shown.panels)
    else:
        write_views(path, [subject.picture], subject.assistant.engine.geometry, [subject.region])


def _colours(tensor: Tensor, subject: Subject) -> Tensor:
    """(3, h, w), normalised -> (h, w, 3) in 0..1."""
    mean, std = (torch.tensor(list(values), dtype=torch.float32) for values in subject.statistics)
    return (tensor.float().cpu().movedim(0, -1) * std + mean).clamp(0, 1)
