"""Which query answers for which object, and what a set of predictions costs.

DETR, arXiv 2005.12872, section 3.1 (one to one, by the Hungarian algorithm); the focal loss (arXiv
1708.02002) and generalised IoU (arXiv 1902.09630) in cost and loss, as DINO, arXiv 2203.03605, has them.
Letters: S sets of predictions, one a layer; B batch, Q queries, K classes, n objects of an image, T of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.heads.dino_boxes import to_centres, to_corners
from stepwell.ops.boxes import paired_giou
from stepwell.structures import Extent, Objects

__all__ = [
    "BoxTerms",
    "Costs",
    "SetLosses",
    "Truths",
    "assign",
    "average_over_processes",
    "costs",
    "focal_loss",
    "set_losses",
]

Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BoxTerms:
    """Weights of the terms of a cost or a loss: focal, of alpha and gamma; L1 of the fractions; 1 - GIoU."""

    label: Weight
    box: Weight = 5.0
    giou: Weight = 2.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    gamma: Weight = 2.0


class Truths(NamedTuple):
    """The objects of a batch, image after image."""

    boxes: Tensor  # (T, 4), corners in pixels
    labels: Tensor  # (T,)
    scale: Tensor  # (T, 4): width, height, width, height of each one's image
    counts: tuple[int, ...]  # objects of every image

    @classmethod
    def of(cls, extents: Sequence[Extent], objects: Sequence[Objects], *, like: Tensor) -> Truths:
        """On the device of `like`, boxes in its dtype."""
        counts = tuple(len(found.labels) for found in objects)
        labels = torch.cat([found.labels for found in objects]).to(like.device, torch.long)
        boxes = torch.cat([found.boxes.reshape(-1, 4) for found in objects]).to(like)
        scale = [like.new_tensor([width, height] * 2) for (height, width), _ in extents]
        of_objects = [row.expand(count, -1) for row, count in zip(scale, counts, strict=True)]
        return cls(boxes, labels, torch.cat(of_objects), counts)

    def by_image(self) -> list[Truths]:
        parts = (part.split(self.counts) for part in (self.boxes, self.labels, self.scale))
        return [
            Truths(boxes, labels, scale, (len(labels),)) for boxes, labels, scale in zip(*parts, strict=True)
        ]


class Costs(NamedTuple):
    """Of every query for every object, (..., Q, n) each, weights included."""

    label: Tensor
    box: Tensor
    giou: Tensor


class SetLosses(NamedTuple):
    """One value a set of predictions, (S,) each, weights included."""

    label: Tensor
    box: Tensor
    giou: Tensor


def costs(logits: Tensor, boxes: Tensor, truths: Truths, terms: BoxTerms) -> Costs:
    """logits (..., Q, K) and boxes (..., Q, 4) in fractions, truths of one image with objects."""
    p = logits.sigmoid()[..., truths.labels]
    least = 1e-12
    missed = -(p + least).log() * terms.alpha * (1 - p) ** terms.gamma
    spared = -(1 - p + least).log() * (1 - terms.alpha) * p**terms.gamma
    scale = truths.scale
    l1 = torch.cdist(boxes, to_centres(truths.boxes / scale), p=1)
    giou = paired_giou(to_corners(boxes)[..., None, :] * scale, truths.boxes)
    return Costs(terms.label * (missed - spared), terms.box * l1, -terms.giou * giou)


def assign(logits: Tensor, boxes: Tensor, truths: Truths, terms: BoxTerms) -> Tensor:
    """logits (S, B, Q, K) and boxes (S, B, Q, 4) in fractions -> (S, B, Q): the object of the batch that a
    query answers for, else -1. Every object has a query as long as there are as many.

    Raises ValueError where a prediction is no finite number.
    """
    assigned = torch.full(logits.shape[:3], -1, dtype=torch.long, device="cpu")
    first = 0
    for image, of_image in enumerate(truths.by_image()):
        count = of_image.counts[0]
        if count:
            label, box, giou = costs(logits[:, image].detach(), boxes[:, image].detach(), of_image, terms)
            for row, matrix in zip(assigned[:, image], (label + box + giou).cpu(), strict=True):
                queries, objects = _cheapest(matrix)
                row[queries] = objects + first
        first += count
    return assigned.to(logits.device)


def _cheapest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, n) on the CPU -> queries and objects of the cheapest pairing."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("matching needs scipy: pip install 'stepwell[detect]'") from error
    if not cost.isfinite().all():
        raise ValueError("predictions to be matched are no finite numbers: the training has diverged")
    queries, objects = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(objects)


def set_losses(
    logits: Tensor, boxes: Tensor, assigned: Tensor, truths: Truths, terms: BoxTerms, normaliser: Tensor
) -> SetLosses:
    """logits (S, B, Q, K), boxes (S, B, Q, 4) in fractions, assigned (S, B, Q): objects of the batch, or -1,
    as many in every set; sums are divided by `normaliser` ()."""
    sets, num_classes = logits.shape[0], logits.shape[-1]
    positive = assigned >= 0
    objects = assigned[positive]
    labels = torch.full_like(assigned, num_classes)
    labels[positive] = truths.labels[objects]
    wanted = F.one_hot(labels, num_classes + 1)[..., :num_classes].to(logits.dtype)
    label = focal_loss(logits, wanted, alpha=terms.alpha, gamma=terms.gamma).flatten(1).sum(1)

    found, right, scale = boxes[positive], truths.boxes[objects], truths.scale[objects]
    of_set = (sets, len(objects) // sets)
    l1 = (found - to_centres(right / scale)).abs().sum(-1).view(of_set).sum(1)
    away = (1 - paired_giou(to_corners(found) * scale, right)).view(of_set).sum(1)
    label, l1, away = (x / normaliser for x in (label, l1, away))
    return SetLosses(terms.label * label, terms.box * l1, terms.giou * away)


def focal_loss(logits: Tensor, wanted: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Logits and 0 or 1 for each -> the same shape; arXiv 1708.02002, equation 5."""
    p = logits.sigmoid()
    missing = (1 - p) * wanted + p * (1 - wanted)
    weight = (alpha * wanted + (1 - alpha) * (1 - wanted)) * missing**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def average_over_processes(counts: Tensor) -> Tensor:
    """Of this process -> the mean over all of a distributed training, one at least."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
        counts = counts / torch.distributed.get_world_size()
    return counts.clamp(min=1)
