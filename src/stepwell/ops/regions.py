"""Regions of maps: averages inside boxes, and the best of boxes that overlap. torchvision is used here only.

He et al., arXiv 1703.06870, section 3 (RoIAlign), in its later form with a shift of half a cell.
Letters: B batch, C width, R regions, s side of the grid that a region is pooled to.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from stepwell.ops.boxes import areas
from stepwell.ops.precision import at_least_single, without_autocast

__all__ = ["pool_region_levels", "pool_regions", "region_levels", "suppress"]

MOST_TOGETHER = 1000  # boxes: above, groups are looked at one after the other, with the same result


def _torchvision_ops() -> ModuleType:
    """Imported where they are needed: it takes its time, and fails beside a torch of another release."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"two-stage detectors need the torchvision of torch {torch.__version__}: {error}"
        ) from error
    ops: ModuleType = torchvision.ops
    return ops


def pool_regions(
    x: Tensor,
    boxes: Tensor,
    images: Tensor,
    side: int,
    *,
    stride: float,
    samples: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign: x (B, C, H, W), boxes (R, 4) in pixels, images (R,) places in the batch -> (R, C, s, s).

    samples: per cell and axis; 0 takes as many as a cell of the pooled grid has map cells, rounded up.
    aligned: centres of map cells lie half a cell inside. Computed in single precision at least.
    """
    dtype = at_least_single(x.dtype)
    with without_autocast(x.device):
        regions = torch.cat([images[:, None].to(dtype), boxes.to(dtype)], dim=1)
        pooled: Tensor = _torchvision_ops().roi_align(
            x.to(dtype), regions, (side, side), 1 / stride, samples, aligned
        )
    return pooled.to(x.dtype)


def region_levels(boxes: Tensor, strides: Sequence[float], finest: float) -> Tensor:
    """Which map a box is read from: (R, 4) -> (R,), 0 for the finest.

    Lin et al., arXiv 1612.03144, equation 1, for any strides: level k from a side (the root of the area) of
    `finest * strides[k] / strides[0]` pixels on.
    """
    scales = areas(boxes).sqrt() / finest + 1e-6
    bounds = scales.new_tensor([stride / strides[0] for stride in strides[1:]])
    return torch.bucketize(scales, bounds, right=True)


def pool_region_levels(
    maps: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    side: int,
    *,
    strides: Sequence[float],
    finest: float,
    samples: int = 0,
    aligned: bool = True,
) -> Tensor:
    """As `pool_regions`, every box from the map of its level. maps: (B, C, h, w), finest first."""
    levels = region_levels(boxes, strides, finest)
    members = [(levels == level).nonzero()[:, 0] for level in range(len(maps))]
    pooled = [
        pool_regions(x, boxes[inside], images[inside], side, stride=stride, samples=samples, aligned=aligned)
        for x, inside, stride in zip(maps, members, strides, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(members).argsort()]


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Places of the boxes that stay, best first: of two of a group that overlap by more than `iou`, the best.

    boxes (n, 4) that start at 0 or after, scores (n,), groups (n,) whole numbers. Two things are as in the
    official code, since results depend on them: groups are moved apart, which rounds the boxes, and equal
    scores stand as torch's sort that is not stable leaves them.
    """
    if not len(boxes):
        return groups.new_zeros(0)
    nms = _torchvision_ops().nms
    order = scores.sort(descending=True).indices
    apart = (boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None])[order]
    scores, groups = scores[order], groups[order]
    if len(boxes) <= MOST_TOGETHER:
        return order[nms(apart, scores, iou)]
    counts = groups.unique(return_counts=True)[1].tolist()
    members = groups.argsort(stable=True).split(counts)
    kept = torch.cat([inside[nms(apart[inside], scores[inside], iou)] for inside in members])
    return order[kept.sort().values]
