"""Arithmetic of boxes: overlaps, and clipping to an image.

Boxes are xyxy in pixels, without "+1" in any width or height.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwell.structures import Size

__all__ = ["areas", "clip_boxes", "paired_giou", "pairwise_iou"]

SMALLEST_AREA = 1e-6  # of what is divided by


def areas(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...)."""
    left, top, right, bottom = boxes.unbind(-1)
    return (right - left) * (bottom - top)


def _intersections(a: Tensor, b: Tensor) -> Tensor:
    """Areas of (..., 4) and (..., 4), broadcast."""
    corner = torch.maximum(a[..., :2], b[..., :2])
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - corner).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, 4), (m, 4) -> (n, m): intersection over union of every pair."""
    shared = _intersections(a[:, None], b[None])
    union = areas(a)[:, None] + areas(b)[None] - shared
    return shared / union.clamp(min=SMALLEST_AREA)


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4), (..., 4), broadcast -> (...): generalised intersection over union of each pair, in [-1, 1].

    Rezatofighi et al., arXiv 1902.09630.
    """
    shared = _intersections(a, b)
    union = (areas(a) + areas(b) - shared).clamp(min=SMALLEST_AREA)
    corner = torch.minimum(a[..., :2], b[..., :2])
    sides = (torch.maximum(a[..., 2:], b[..., 2:]) - corner).clamp(min=0)
    hull = (sides[..., 0] * sides[..., 1]).clamp(min=SMALLEST_AREA)
    return shared / union - (hull - union) / hull


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """(..., 4) -> (..., 4) inside an image of size (H, W)."""
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)
