"""How far a box is from where it should be."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.heads.box_coder import BoxCoder
from stepwell.ops.boxes import paired_giou

__all__ = ["BoxLoss"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BoxLoss:
    """measure: "l1" or "smooth_l1" (a parabola within `beta`) of deltas, or "giou", 1 - GIoU of boxes."""

    measure: Literal["l1", "smooth_l1", "giou"] = "l1"
    beta: float = Field(default=1.0, gt=0)
    weight: float = 1.0

    def __call__(self, deltas: Tensor, boxes: Tensor, targets: Tensor, coder: BoxCoder) -> Tensor:
        """deltas (n, 4) that move boxes (n, 4) to targets (n, 4) -> (n,), times the weight."""
        if self.measure == "giou":
            return self.weight * (1 - paired_giou(coder.decode(boxes, deltas), targets))
        wanted = coder.encode(boxes, targets)
        if self.measure == "l1":
            errors = (deltas - wanted).abs()
        else:
            errors = F.smooth_l1_loss(deltas, wanted, reduction="none", beta=self.beta)
        return self.weight * errors.sum(1)
