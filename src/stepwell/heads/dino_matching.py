"""Which query answers for which object, and what a set of predictions has to learn.

DETR, arXiv 2005.12872, section 3.1 (bipartite matching); focal loss, arXiv 1708.02002; generalised IoU,
arXiv 1902.09630; the costs and weights of DINO, arXiv 2203.03605.
Letters: Q predictions of an image, n objects, K classes. Boxes are centre and size in parts of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.ops.boxes import paired_giou, pairwise_giou
from stepwell.structures import Size

__all__ = ["MatchConfig", "SetLossConfig", "Targets", "assign", "costs", "set_losses", "to_corners"]

Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MatchConfig:
    """Weights of the costs, and the focal cost's alpha and gamma."""

    classes: Weight = 2.0
    boxes: Weight = 5.0
    giou: Weight = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SetLossConfig:
    """Weights of the losses, and the focal loss's alpha and gamma."""

    classes: Weight = 1.0
    boxes: Weight = 5.0
    giou: Weight = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


class Targets(NamedTuple):
    """What the predictions of an image are to become."""

    labels: Tensor  # (Q,), K where there is nothing
    boxes: Tensor  # (Q, 4), centre and size, 0 where there is nothing


def to_corners(boxes: Tensor, size: Size) -> Tensor:
    """(..., 4), centre and size in parts of an image of `size` -> xyxy in its pixels."""
    height, width = size
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1) * boxes.new_tensor([width, height, width, height])


def costs(
    logits: Tensor, boxes: Tensor, labels: Tensor, true_boxes: Tensor, size: Size, config: MatchConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (Q, K), boxes (Q, 4), labels (n,), true_boxes (n, 4) -> costs (Q, n) of classes, of boxes, of
    overlaps, with their weights in them.
    """
    share = logits.sigmoid()
    positive = -(share + 1e-12).log() * config.alpha * (1 - share) ** config.gamma
    negative = -(1 - share + 1e-12).log() * (1 - config.alpha) * share**config.gamma
    of_classes = (positive - negative)[:, labels] * config.classes
    of_boxes = torch.cdist(boxes, true_boxes, p=1) * config.boxes
    overlap = pairwise_giou(to_corners(boxes, size), to_corners(true_boxes, size))
    return of_classes, of_boxes, -overlap * config.giou


@torch.no_grad()
def assign(
    logits: Tensor, boxes: Tensor, labels: Tensor, true_boxes: Tensor, size: Size, config: MatchConfig
) -> Tensor:
    """As `costs` -> (Q,): the object of each prediction, -1 for none. Each object has one, and the sum of the
    costs is the smallest. Raises ImportError without scipy.
    """
    assignment = labels.new_full((len(logits),), -1)
    if len(labels):
        total = sum(costs(logits, boxes, labels, true_boxes, size, config))
        assert isinstance(total, Tensor)
        queries, objects = _hungarian(total)
        assignment[queries.to(labels.device)] = objects.to(labels)
    return assignment


def _hungarian(total: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError(
            'DINO assigns objects to queries by scipy; install it by pip install "stepwell[detect]"'
        ) from None
    rows, columns = linear_sum_assignment(total.cpu().numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    normaliser: Tensor,
    config: SetLossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, Q, K), boxes (B, Q, 4), a target and a size in pixels of each image -> losses of classes, of
    boxes and of overlaps, with their weights in them, divided by `normaliser`.
    """
    num_classes = logits.shape[-1]
    labels = torch.stack([each.labels for each in targets])
    true_boxes = torch.stack([each.boxes for each in targets]).to(boxes)
    wanted = F.one_hot(labels, num_classes + 1)[..., :num_classes].to(logits)
    of_classes = focal_loss(logits, wanted, alpha=config.alpha, gamma=config.gamma).sum()
    is_object = labels < num_classes
    of_boxes = (boxes - true_boxes).abs()[is_object].sum()
    found, true = (
        torch.cat([to_corners(each[i][is_object[i]], size) for i, size in enumerate(sizes)])
        for each in (boxes, true_boxes)
    )
    of_overlaps = (1 - paired_giou(found, true)).sum()
    return (
        config.classes * of_classes / normaliser,
        config.boxes * of_boxes / normaliser,
        config.giou * of_overlaps / normaliser,
    )


def focal_loss(logits: Tensor, wanted: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Of every number, arXiv 1708.02002, equation 5."""
    share = logits.sigmoid()
    miss = (1 - share) * wanted + share * (1 - wanted)
    weight = (alpha * wanted + (1 - alpha) * (1 - wanted)) * miss**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
