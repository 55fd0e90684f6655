"""Which query learns which object, and the losses of a layer: the other half of the peer of DINO's heads.

Letters: B batch, Q queries, K classes, n objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from stepwell.structures import Objects

Prediction = tuple[Tensor, Tensor]  # class logits (B, Q, K), boxes (B, Q, 4): centres and sizes, 0 to 1
Pairs = list[tuple[Tensor, Tensor]]  # of every image the queries and the objects that belong to them
ALPHA, GAMMA = 0.25, 2.0
CLASS, DISTANCE, OVERLAP = 1.0, 5.0, 2.0  # weights of the losses; a class counts twice when matching


def matched(prediction: Prediction, scales: Tensor, objects: Sequence[Objects]) -> Pairs:
    """The cheapest pairs of every image, each object in one. scales (B, 4): width and height, twice."""
    pairs = []
    for classes, boxes, scale, image in zip(*prediction, scales, objects, strict=True):
        p = classes.detach().sigmoid()
        boxes = boxes.detach()
        wrong = -(1 - p + 1e-12).log() * (1 - ALPHA) * p**GAMMA
        right = -(p + 1e-12).log() * ALPHA * (1 - p) ** GAMMA
        true = box_convert(image.boxes / scale, "xyxy", "cxcywh")
        corners = box_convert(boxes, "cxcywh", "xyxy") * scale
        cost = 2 * CLASS * (right - wrong)[:, image.labels] + DISTANCE * torch.cdist(boxes, true, p=1)
        cost = cost - OVERLAP * generalized_box_iou(corners, image.boxes)
        queries, truths = linear_sum_assignment(cost.numpy())
        pairs.append((torch.from_numpy(queries), torch.from_numpy(truths)))
    return pairs


def denoised(objects: Sequence[Objects], groups: int, count: int) -> Pairs:
    """The first half of every group are the objects, moved a little. count: of all denoising queries."""
    pairs = []
    for image in objects:
        truths = torch.arange(len(image.labels))
        starts = torch.arange(groups) * (count // groups)
        pairs.append(((starts[:, None] + truths).flatten(), truths.repeat(groups)))
    return pairs


def layer_losses(
    name: str, prediction: Prediction, scales: Tensor, objects: Sequence[Objects], pairs: Pairs
) -> dict[str, Tensor]:
    """Of all queries whether they know their class, of pairs how well the boxes fit."""
    classes, boxes = prediction
    targets = torch.zeros_like(classes)
    for i, (queries, truths) in enumerate(pairs):
        targets[i, queries, objects[i].labels[truths]] = 1
    count = max(1, sum(len(queries) for queries, _ in pairs))
    found = torch.cat([boxes[i, queries] for i, (queries, _) in enumerate(pairs)])
    corners = torch.cat([objects[i].boxes[truths] for i, (_, truths) in enumerate(pairs)])
    scale = torch.cat([scales[i].expand(len(queries), 4) for i, (queries, _) in enumerate(pairs)])
    distance = (found - box_convert(corners / scale, "xyxy", "cxcywh")).abs().sum()
    overlap = generalized_box_iou_loss(box_convert(found, "cxcywh", "xyxy") * scale, corners, reduction="sum")
    return {
        f"{name}_class": CLASS * sigmoid_focal_loss(classes, targets, ALPHA, GAMMA, reduction="sum") / count,
        f"{name}_box": DISTANCE * distance / count,
        f"{name}_overlap": OVERLAP * overlap / count,
    }
