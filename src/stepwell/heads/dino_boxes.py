"""Boxes as DINO writes them, and how well two of them agree.

By *centre*: (centre x, centre y, width, height), in fractions of an image; by *corners*: (left, top, right,
bottom).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["generalised_iou", "inverse_sigmoid", "to_centres", "to_corners"]

LEAST_AREA = 1e-6  # square pixels, so that nothing is divided by 0


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) by centre -> by corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) by corners -> by centre."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], -1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Boxes (..., 4) by corners, in pixels, that broadcast -> (...), in (-1, 1] (arXiv 1902.09630)."""
    shared = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - shared
    around = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union, around = union.clamp(min=LEAST_AREA), around.clamp(min=LEAST_AREA)
    return shared / union - (around - union) / around


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logits of what lies in [0, 1]; beyond, and nearer to an end than `eps`, they stay as that end's."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
