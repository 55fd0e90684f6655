"""Masks of boxes, put where the boxes lie in an image.

He et al., arXiv 1703.06870, section 3.1 (inference). Pixels have their centres at halves.
Letters: n masks, m their side, (H, W) the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwell.structures import Size

__all__ = ["paste"]


def paste(masks: Tensor, boxes: Tensor, size: Size, *, threshold: float | None = None) -> Tensor:
    """Probabilities (n, m, m) inside boxes (n, 4), in pixels of an image of size (H, W) -> (n, H, W).

    Bilinear, and zero from a whole pixel outside the box on, as the official code on a CPU. With a threshold,
    booleans: a pixel is in the mask from this probability on, and probabilities are held for one box at a
    time. Raises ValueError for a threshold that is not positive.
    """
    if threshold is not None and threshold <= 0:
        raise ValueError(f"a mask's threshold must be positive, got {threshold}")
    height, width = size
    pasted = masks.new_zeros(
        (len(masks), height, width), dtype=masks.dtype if threshold is None else torch.bool
    )
    edges = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).long().tolist()
    for place, (left, top, right, bottom) in enumerate(edges):
        top, bottom = max(top, 0), min(bottom, height)
        left, right = max(left, 0), min(right, width)
        if top >= bottom or left >= right:
            continue
        x0, y0, x1, y1 = boxes[place].to(masks.dtype)
        across = _weights(left, right, x0, x1, masks)
        down = _weights(top, bottom, y0, y1, masks)
        part = down @ masks[place] @ across.T
        pasted[place, top:bottom, left:right] = part if threshold is None else part >= threshold
    return pasted


def _weights(first: int, last: int, low: Tensor, high: Tensor, masks: Tensor) -> Tensor:
    """Share of each of m cells between `low` and `high` in the pixels from `first` to before `last`:
    (pixels, m).
    """
    side = masks.shape[-1]
    centres = torch.arange(first, last, dtype=masks.dtype, device=masks.device) + 0.5
    cells = (centres - low) / (high - low) * side - 0.5
    cells = torch.where(cells.isfinite(), cells, (side - 1) / 2)  # an empty box has its middle, as officially
    return (1 - (cells[:, None] - torch.arange(side, device=masks.device)).abs()).clamp(min=0)
