"""Masks of the objects of an image -> one map in which every pixel belongs to one object, or to none.

Where masks overlap, the one with the largest probability times score has the pixel, as in transformers'
panoptic post-processing. Masks are looked at one after the other, each in the region of its box: all of them
at the size of a big image would take gigabytes.
Letters: n objects, m side of a mask inside its box, (H, W) the size of the image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepwell.ops.paste import paste
from stepwell.ops.sliding_windows import Window
from stepwell.structures import FoundObjects, Size

__all__ = ["instance_map", "mask_in_region", "region_of"]


def instance_map(
    found: FoundObjects,
    size: Size,
    *,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """found: of one image, boxes in pixels of an image of `size`, with masks.

    A mask is where its probability is at least `mask_threshold`. An object is left out when others have taken
    so much of it that no larger share than `overlap_mask_area_threshold` is left. The map (H, W), int32,
    holds the id of an object, from 0 on, or -1; then come transformers' `segments_info`: id, label_id and
    score. Raises ValueError where there are no masks.
    """
    if found.masks is None:
        raise ValueError("these detections have no masks; take a detector with a mask head")
    best = found.scores.new_zeros(size, dtype=torch.float32)
    owner = torch.full(size, -1, dtype=torch.int32, device=best.device)
    areas = []
    for number, (mask, box, score) in enumerate(zip(found.masks, found.boxes, found.scores, strict=True)):
        values, (top, left, bottom, right) = mask_in_region(mask, box, size)
        inside = values >= mask_threshold
        areas.append(inside.sum())
        strength, seen = values * score, best[top:bottom, left:right]
        wins = inside & (strength > seen)
        seen[wins] = strength[wins]
        owner[top:bottom, left:right][wins] = number
    kept = _kept(owner, areas, overlap_mask_area_threshold)
    ids = torch.full((len(areas) + 1,), -1, dtype=torch.int32, device=owner.device)  # the last: of no object
    ids[kept] = torch.arange(len(kept), dtype=torch.int32, device=owner.device)
    segments = [
        {
            "id": i,
            "label_id": int(found.labels[k]),
            "was_fused": False,
            "score": round(float(found.scores[k]), 6),
        }
        for i, k in enumerate(kept)
    ]
    return ids[owner.long()], segments


def _kept(owner: Tensor, areas: list[Tensor], threshold: float) -> list[int]:
    """Objects of which enough is left."""
    if not areas:
        return []
    left = torch.bincount(owner.flatten() + 1, minlength=len(areas) + 1)[1:]
    whole = torch.stack(areas)
    return (left > threshold * whole).nonzero().flatten().tolist()


def mask_in_region(mask: Tensor, box: Tensor, size: Size) -> tuple[Tensor, Window]:
    """Probabilities (m, m) inside a box (4,) of an image of `size` -> those of the pixels that they reach,
    single precision, and where these lie. Both are empty for a box outside of the image.
    """
    top, left, bottom, right = region_of(box.tolist(), len(mask), size)
    inner = box - box.new_tensor([left, top, left, top])
    values = paste(mask[None], inner[None], (bottom - top, right - left))[0].float()
    return values, Window(top, left, bottom, right)


def region_of(box: list[float], cells: int, size: Size) -> Window:
    """What a mask of `cells` a side may reach: the box and a cell around it, within the image. Empty for a
    box outside of it.
    """
    x1, y1, x2, y2 = box
    margin_x, margin_y = max(x2 - x1, 0) / cells, max(y2 - y1, 0) / cells
    top, left = math.floor(y1 - margin_y), math.floor(x1 - margin_x)
    bottom, right = math.ceil(y2 + margin_y), math.ceil(x2 + margin_x)
    top, left = min(max(top, 0), size[0]), min(max(left, 0), size[1])
    return Window(top, left, min(max(bottom, top), size[0]), min(max(right, left), size[1]))
