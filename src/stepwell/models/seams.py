"""Objects that were found in overlapping tiles of a picture -> each object once, and whole.

Two tiles look at the same pixels where they overlap, and there they should have found the same. So two finds
are one object where what lies of them in the overlap agrees, in masks where there are any, else in boxes. A
find is *cut* where it touches a seam: an edge of its tile that lies inside the picture. An object that tiles
have seen whole is taken from that in which it lies farthest from a seam; one that was cut everywhere is put
together from its parts.
Letters: n finds of all tiles, a and b tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stepwell.models.masks import CroppedMasks, common_window, part_of, union
from stepwell.models.predictions import Detections
from stepwell.ops.sliding_windows import Window
from stepwell.structures import Size

__all__ = ["join_across_seams"]

AGREES = 0.5
"""Share of what two finds cover in the overlap of their tiles: of their union where both are whole, of the
smaller where one is cut, whose edge at the seam is uncertain."""
TOUCHES = 0.01
"""Share of a tile's side within which a box ends at its edge, one pixel at least."""


def join_across_seams(found: Sequence[Detections], tiles: Sequence[Window], size: Size) -> Detections:
    """found: of each tile, boxes and masks in pixels of the picture, which is of `size`. Best first."""
    joined = _concatenated(found)
    tile_of = [tile for tile, one in enumerate(found) for _ in range(len(one))]
    room = [
        space for one, tile in zip(found, tiles, strict=True) for space in _to_seams(one.boxes, tile, size)
    ]
    is_cut = [space <= 1 for space in room]
    groups = [_Group([i], {tile}) for i, tile in enumerate(tile_of)]
    for pair in sorted(_pairs(joined, tile_of, is_cut, tiles), key=lambda pair: -pair.agreement):
        one, other = groups[pair.first], groups[pair.second]
        if one is not other and not one.tiles & other.tiles:  # a model tells objects of one tile apart
            one.take(other)
            for i in other.members:
                groups[i] = one
    kept = list({id(group): group for group in groups}.values())
    objects = [_object(joined, group.members, room) for group in kept]
    parts = _parts_of_others(joined, objects, kept, tile_of, is_cut)
    return _in_order(joined, [one for i, one in enumerate(objects) if i not in parts])


@dataclass
class _Group:
    """Finds that are one object, at most one of a tile."""

    members: list[int]
    tiles: set[int] = field(default_factory=set)

    def take(self, other: _Group) -> None:
        self.members += other.members
        self.tiles |= other.tiles


class _Pair(NamedTuple):
    first: int
    second: int
    agreement: float


class _Object(NamedTuple):
    box: Tensor  # (4,)
    score: float
    label: int
    mask: tuple[Tensor, Window] | None


def _concatenated(found: Sequence[Detections]) -> Detections:
    masks = [one.masks for one in found]
    return replace(
        found[0],
        boxes=torch.cat([one.boxes for one in found]),
        scores=torch.cat([one.scores for one in found]),
        labels=torch.cat([one.labels for one in found]),
        masks=None if masks[0] is None else _joined_masks([one for one in masks if one is not None]),
    )


def _joined_masks(masks: Sequence[CroppedMasks]) -> CroppedMasks:
    crops = tuple(crop for one in masks for crop in one.crops)
    return replace(masks[0], crops=crops, windows=tuple(window for one in masks for window in one.windows))


def _to_seams(boxes: Tensor, tile: Window, size: Size) -> list[float]:
    """Of each box (n, 4), how far it ends from the nearest seam: up to 1 is at it, infinite without one."""
    across, down = (max(1.0, TOUCHES * side) for side in (tile.right - tile.left, tile.bottom - tile.top))
    left, top, right, bottom = boxes.unbind(1)
    distances = [torch.full_like(left, torch.inf)]
    if tile.left > 0:
        distances.append((left - tile.left) / across)
    if tile.top > 0:
        distances.append((top - tile.top) / down)
    if tile.right < size[1]:
        distances.append((tile.right - right) / across)
    if tile.bottom < size[0]:
        distances.append((tile.bottom - bottom) / down)
    return torch.stack(distances).amin(0).tolist()


def _pairs(
    found: Detections, tile_of: Sequence[int], is_cut: Sequence[bool], tiles: Sequence[Window]
) -> Iterator[_Pair]:
    """Finds of one class in tiles that overlap, which agree there."""
    members: dict[int, list[int]] = {}
    for i, tile in enumerate(tile_of):
        members.setdefault(tile, []).append(i)
    edges = torch.tensor([tiles[tile] for tile in members]).view(-1, 4)
    seen = list(members)
    for place, a in enumerate(seen):
        top, left, bottom, right = edges[place + 1 :].unbind(1)
        own = tiles[a]
        meets = (top < own.bottom) & (bottom > own.top) & (left < own.right) & (right > own.left)
        for step in meets.nonzero().flatten().tolist():
            b = seen[place + 1 + step]
            yield from _pairs_of(found, members[a], members[b], is_cut, common_window(own, tiles[b]))


def _pairs_of(
    found: Detections, ours: list[int], theirs: list[int], is_cut: Sequence[bool], overlap: Window
) -> Iterator[_Pair]:
    top, left, bottom, right = overlap
    border = found.boxes.new_tensor([left, top, right, bottom])
    a, b = (_within(found.boxes[places], border) for places in (ours, theirs))
    corner = torch.maximum(a[:, None, :2], b[None, :, :2])
    shared = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - corner).clamp(min=0).prod(2)
    may_be = (shared > 0) & (found.labels[ours][:, None] == found.labels[theirs])
    sizes = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    for i, j in may_be.nonzero().tolist():
        first, second = ours[i], theirs[j]
        areas = (float(shared[i, j]), float(sizes[0][i]), float(sizes[1][j]))
        if found.masks is not None:
            areas = _mask_areas(found.masks, first, second, overlap)
        inter, one, other = areas
        agreement = inter / max(one + other - inter, 1e-9)
        of_smaller = inter / max(min(one, other), 1e-9)
        if (of_smaller if is_cut[first] or is_cut[second] else agreement) > AGREES:
            yield _Pair(first, second, agreement)


def _within(boxes: Tensor, border: Tensor) -> Tensor:
    """Boxes (n, 4), clipped to one (4,); those outside of it are empty."""
    low = torch.minimum(torch.maximum(boxes[:, :2], border[:2]), border[2:])
    return torch.cat([low, torch.maximum(torch.minimum(boxes[:, 2:], border[2:]), low)], 1)


def _mask_areas(masks: CroppedMasks, i: int, j: int, overlap: Window) -> tuple[float, float, float]:
    """Pixels in the overlap of both masks, of the first, and of the second."""
    first, second = (part_of(masks.crops[k].numpy(), masks.windows[k], overlap) for k in (i, j))
    windows = [common_window(masks.windows[k], overlap) for k in (i, j)]
    both = part_of(first, windows[0], windows[1]) & part_of(second, windows[1], windows[0])
    return float(np.count_nonzero(both)), float(np.count_nonzero(first)), float(np.count_nonzero(second))


def _object(found: Detections, members: Sequence[int], room: Sequence[float]) -> _Object:
    """From where it is whole, the farthest from a seam; else what its parts cover together. A model may end a
    box short of the seam that cuts it, and be surer of that than of the whole.
    """
    whole = [i for i in members if room[i] > 1]
    parts = [max(whole, key=lambda i: (room[i], float(found.scores[i])))] if whole else list(members)
    boxes = found.boxes[parts]
    box = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
    mask = None if found.masks is None else union(found.masks, parts)
    return _Object(box, float(found.scores[whole or parts].max()), int(found.labels[members[0]]), mask)


def _parts_of_others(
    found: Detections,
    objects: Sequence[_Object],
    groups: Sequence[_Group],
    tile_of: Sequence[int],
    is_cut: Sequence[bool],
) -> set[int]:
    """Objects that are no more than a cut part of another: a tile may see two ends of one object.

    The other is not one that the same tile has seen whole, beside the part.
    """
    boxes = torch.stack([one.box for one in objects]) if objects else torch.zeros(0, 4)
    labels = torch.tensor([one.label for one in objects])
    parts: set[int] = set()
    for i, (one, group) in enumerate(zip(objects, groups, strict=True)):
        if len(group.members) > 1 or not is_cut[group.members[0]]:
            continue
        inside = _within(boxes, one.box)
        shares = (inside[:, 2:] - inside[:, :2]).prod(1) / (one.box[2:] - one.box[:2]).prod().clamp(min=1e-9)
        for j in ((shares > AGREES) & (labels == one.label)).nonzero().flatten().tolist():
            own = [k for k in groups[j].members if tile_of[k] == tile_of[group.members[0]]]
            is_apart = groups[j].tiles == group.tiles or any(not is_cut[k] for k in own)
            if j != i and j not in parts and not is_apart and _covers(objects[j], one):
                parts.add(i)
                break
    return parts


def _covers(one: _Object, other: _Object) -> bool:
    """Whether the masks, where there are any, agree that most of the other is in the one."""
    if one.mask is None or other.mask is None:
        return True
    (crop, window), (other_crop, other_window) = one.mask, other.mask
    both = part_of(crop, window, other_window) & part_of(other_crop, other_window, window)
    return float(both.sum()) > AGREES * float(other_crop.sum())


def _in_order(found: Detections, objects: Sequence[_Object]) -> Detections:
    ranked = sorted(objects, key=lambda one: -one.score)
    masks = None
    if found.masks is not None:
        crops, windows = zip(*(one.mask for one in ranked if one.mask), strict=True) if ranked else ((), ())
        masks = replace(found.masks, crops=crops, windows=windows)
    return replace(
        found,
        boxes=torch.stack([one.box for one in ranked]) if ranked else found.boxes[:0],
        scores=torch.tensor([one.score for one in ranked]),
        labels=torch.tensor([one.label for one in ranked], dtype=torch.int64),
        masks=masks,
    )
