"""A box told by another one: where its centre lies and how much larger it is.

Girshick, arXiv 1311.2524, appendix C, with deviations that make the numbers alike in size.
"""

from __future__ import annotations

import math

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.ops.boxes import clip_boxes
from stepwell.structures import Size

__all__ = ["BoxCoder"]

Four = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BoxCoder:
    """Deltas are (x and y of the centre in the box's own sides, logarithms of the sides' ratios), less
    `means` and divided by `stds`. smallest_ratio: sides shrink to this share, or grow to one by it, at most.
    """

    means: Four = (0.0, 0.0, 0.0, 0.0)
    stds: Four = (1.0, 1.0, 1.0, 1.0)
    smallest_ratio: float = 16 / 1000

    def encode(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """(n, 4), (n, 4) -> (n, 4)."""
        sides, target_sides = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
        shift = ((targets[:, :2] + targets[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) * 0.5
        deltas = torch.cat([shift / sides, (target_sides / sides).log()], dim=1)
        return (deltas - deltas.new_tensor(self.means)) / deltas.new_tensor(self.stds)

    def decode(self, boxes: Tensor, deltas: Tensor, size: Size | None = None) -> Tensor:
        """boxes (n, 4), deltas (n, 4) or (n, K, 4) -> as the deltas; clipped to an image of size (H, W)."""
        if deltas.ndim == 3:
            boxes = boxes[:, None]
        deltas = deltas * deltas.new_tensor(self.stds) + deltas.new_tensor(self.means)
        limit = abs(math.log(self.smallest_ratio))
        sides = boxes[..., 2:] - boxes[..., :2]
        centres = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + sides * deltas[..., :2]
        halves = sides * deltas[..., 2:].clamp(-limit, limit).exp() * 0.5
        decoded = torch.cat([centres - halves, centres + halves], dim=-1)
        return decoded if size is None else clip_boxes(decoded, size)
