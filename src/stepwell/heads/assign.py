"""Which object a box has to find, and which boxes are learnt from.

Ren et al., arXiv 1506.01497, section 3.1.2.
Letters: n boxes, m objects.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.ops.boxes import pairwise_iou

__all__ = ["BACKGROUND", "NEITHER", "Assignment", "Sample", "Sampling"]

BACKGROUND = -1
NEITHER = -2
"""In place of an object's place: for a box without one, and for a box that is not learnt from."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Assignment:
    """By overlap. positive, negative: IoU from which on a box is an object's, and below which background's.

    low_quality: an object whose best overlap is `smallest` or more takes the boxes that have it, all of them,
    even from a better match; the last object wins.
    """

    positive: float = 0.5
    negative: float = 0.5
    smallest: float = 0.5
    low_quality: bool = True

    def __call__(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """(n, 4), (m, 4) -> (n,): place of a box's object, BACKGROUND or NEITHER."""
        if not len(objects) or not len(boxes):
            return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
        overlaps = pairwise_iou(objects, boxes)  # (m, n)
        best, best_object = overlaps.max(dim=0)
        assigned = torch.full_like(best_object, NEITHER)
        assigned[best < self.negative] = BACKGROUND
        assigned = torch.where(best >= self.positive, best_object, assigned)
        if self.low_quality:
            best_of_object = overlaps.max(dim=1, keepdim=True).values
            takes = (overlaps == best_of_object) & (best_of_object >= self.smallest)
            places = torch.arange(len(objects), device=boxes.device)[:, None]
            taker = torch.where(takes, places, -1).max(dim=0).values
            assigned = torch.where(taker >= 0, taker, assigned)
        return assigned


class Sample(NamedTuple):
    """Boxes of one image that are learnt from; places are among the boxes they were drawn from, ascending."""

    positive: Tensor  # (p,)
    negative: Tensor  # (q,)
    objects: Tensor  # (p,) places of the positives' objects

    @property
    def places(self) -> Tensor:
        """(p + q,), positives first."""
        return torch.cat([self.positive, self.negative])


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Sampling:
    """num: boxes of an image, at most the share `positive` of them positive, the rest negative.

    most_negatives: by positives, of which at least one counts; None sets no limit.
    choice: "random" draws with torch's generator on the CPU; "first" takes the first ones, for comparisons.
    """

    num: int = Field(default=512, ge=1)
    positive: float = Field(default=0.25, ge=0, le=1)
    most_negatives: float | None = Field(default=None, ge=0)
    choice: Literal["random", "first"] = "random"

    def __call__(self, assigned: Tensor) -> Sample:
        """assigned (n,): see `Assignment`."""
        positive = self._take((assigned >= 0).nonzero()[:, 0], int(self.num * self.positive))
        num_negative = self.num - len(positive)
        if self.most_negatives is not None:
            num_negative = min(num_negative, int(self.most_negatives * max(1, len(positive))))
        negative = self._take((assigned == BACKGROUND).nonzero()[:, 0], num_negative)
        return Sample(positive, negative, assigned[positive])

    def _take(self, candidates: Tensor, num: int) -> Tensor:
        if len(candidates) <= num:
            return candidates
        if self.choice == "first":
            return candidates[:num]
        return candidates[torch.randperm(len(candidates))[:num].sort().values.to(candidates.device)]
