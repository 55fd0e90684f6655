"""Boxes as DINO writes them.

By *centre*: (centre x, centre y, width, height), in fractions of an image; by *corners*: (left, top, right,
bottom).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_sigmoid", "to_centres", "to_corners"]


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) by centre -> by corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) by corners -> by centre."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logits of what lies in [0, 1]; beyond, and nearer to an end than `eps`, they stay as that end's."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
