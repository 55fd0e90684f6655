"""Masks of the objects of a picture, each kept in the part of the picture that it reaches.

Whole masks of the objects of a big picture would take gigabytes. Letters: n objects, (h, w) the part of one,
(H, W) the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepwell.heads.instances import mask_in_region
from stepwell.ops.run_lengths import Mask, compressed, mask_runs
from stepwell.ops.sliding_windows import Window
from stepwell.structures import FoundObjects, Size

__all__ = ["CroppedMasks", "common_window", "part_of", "union"]


Crop = TypeVar("Crop", Tensor, Mask)


@dataclass(frozen=True, eq=False, repr=False)
class CroppedMasks:
    """`masks[i]` is the whole mask (H, W) of an object, and `masks.whole()` all of them, bool; both are made
    when they are asked for.
    """

    crops: tuple[Tensor, ...]  # of each object, bool (h, w)
    windows: tuple[Window, ...]  # where each lies in the picture
    image_size: Size

    def __post_init__(self) -> None:
        sizes = [(window.bottom - window.top, window.right - window.left) for window in self.windows]
        if sizes != [tuple(crop.shape) for crop in self.crops]:
            raise ValueError("every crop of a mask needs a window of its own size")

    @classmethod
    def of(cls, found: FoundObjects, size: Size, *, threshold: float = 0.5) -> CroppedMasks:
        """Of what a head has found: boxes in pixels of a picture of `size`, and probabilities (n, m, m)
        inside each; a mask is where they are at least the threshold.
        """
        assert found.masks is not None
        crops, windows = [], []
        for mask, box in zip(found.masks, found.boxes, strict=True):  # probabilities of one object at a time
            values, window = mask_in_region(mask, box, size)
            crops.append((values >= threshold).cpu())
            windows.append(window)
        return cls(tuple(crops), tuple(windows), size)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i: int) -> Tensor:
        mask = torch.zeros(self.image_size, dtype=torch.bool)
        top, left, bottom, right = self.windows[i]
        mask[top:bottom, left:right] = self.crops[i]
        return mask

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"CroppedMasks({len(self)} of {width} x {height})"

    def whole(self) -> Tensor:
        """(n, H, W), bool."""
        masks = [self[i] for i in range(len(self))]
        return torch.stack(masks) if masks else torch.zeros(0, *self.image_size, dtype=torch.bool)

    def select(self, places: Iterable[int]) -> CroppedMasks:
        """Those of some of the objects."""
        places = list(places)
        return CroppedMasks(
            tuple(self.crops[i] for i in places), tuple(self.windows[i] for i in places), self.image_size
        )

    def moved(self, top: int, left: int, size: Size) -> CroppedMasks:
        """The same in a picture of `size`, of which this one is the part that begins there."""
        windows = [Window(w.top + top, w.left + left, w.bottom + top, w.right + left) for w in self.windows]
        return CroppedMasks(self.crops, tuple(windows), size)

    def area(self, i: int) -> int:
        """In pixels."""
        return int(self.crops[i].count_nonzero())

    def run_lengths(self, i: int) -> dict[str, Any]:
        """A mask as COCO's compressed run lengths: `size` [H, W] and `counts`."""
        counts = mask_runs(self.crops[i].numpy(), self.windows[i], self.image_size)
        return {"size": list(self.image_size), "counts": compressed(counts)}


def common_window(window: Window, other: Window) -> Window:
    """Where two windows overlap; as thin as nothing where they do not."""
    top, left = max(window.top, other.top), max(window.left, other.left)
    bottom, right = min(window.bottom, other.bottom), min(window.right, other.right)
    return Window(top, left, max(top, bottom), max(left, right))


def part_of(crop: Crop, own: Window, window: Window) -> Crop:
    """What of a crop (h, w), which lies at `own`, lies in a window."""
    top, left, bottom, right = common_window(own, window)
    return crop[top - own.top : bottom - own.top, left - own.left : right - own.left]


def union(masks: CroppedMasks, places: Sequence[int]) -> tuple[Tensor, Window]:
    """The crop and the window of what at least one of the masks covers."""
    if len(places) == 1:
        return masks.crops[places[0]], masks.windows[places[0]]
    tops, lefts, bottoms, rights = zip(*(masks.windows[i] for i in places), strict=True)
    window = Window(min(tops), min(lefts), max(bottoms), max(rights))
    crop = torch.zeros(window.bottom - window.top, window.right - window.left, dtype=torch.bool)
    for i in places:
        own = masks.windows[i]
        rows = slice(own.top - window.top, own.bottom - window.top)
        crop[rows, own.left - window.left : own.right - window.left] |= masks.crops[i]
    return crop, window
