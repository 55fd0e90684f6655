"""Boxes in answers, and how well they lie: RefCOCO's accuracy, as lmms-eval reads and counts it.

A box is (left, top, right, bottom), as fractions of the image's sides or in whatever unit the right one has.
"""

from __future__ import annotations

import re

from stepwell.structures import Box

__all__ = ["ENOUGH", "box_iou", "read_box"]

ENOUGH = 0.5
"""IoU from which a box counts as right."""

_BOX = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


def read_box(text: str) -> Box | None:
    """The first "[a, b, c, d]" of a text, None where there is none."""
    match = _BOX.search(text)
    if match is None:
        return None
    left, top, right, bottom = map(float, match.groups())
    return left, top, right, bottom


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for two boxes without area."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
