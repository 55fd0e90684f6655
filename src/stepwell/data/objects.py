"""Images with boxes and masks around what is on them: what detectors learn from, whatever file tells it.

All are in the pixels of the upright image, as `open_image` gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.data.masks import Mask, Numbers, compressed_mask, decode_mask, encode_mask, mask_spans
from stepwell.images.label_map import turned
from stepwell.structures import Box, Size

__all__ = ["AnnotatedImage", "Annotation", "StoredMask", "words"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMask:
    """A mask as its file holds it (`decode_mask`), which has been looked at and fits its image."""

    segmentation: Any
    size: Size  # (height, width) of the pixels in which it is told
    orientation: int = 1  # Exif's, by which these are turned

    def pixels(self) -> Mask:
        """(H, W) of the upright image, True on the object; without a pixel for a polygon thinner than one.

        Raises ImportError where faster-coco-eval, which draws polygons, is missing.
        """
        mask = decode_mask(self.segmentation, self.size)
        return mask if self.orientation == 1 else turned(mask.astype(np.int64), self.orientation) > 0

    def spans(self) -> Numbers:
        """(n, 2): of the same pixels, runs down the columns (`mask_spans`). Pixels are made only where they
        must be turned. Raises ImportError as `pixels` does.
        """
        if self.orientation == 1:
            return mask_spans(self.segmentation, self.size)
        turned_pixels = self.pixels()
        height, width = turned_pixels.shape
        return mask_spans(encode_mask(turned_pixels), (height, width))

    def run_lengths(self) -> dict[str, Any]:
        """Of the same pixels: {"size": [H, W], "counts": text}, as COCO files hold them. Pixels are made only
        where they must be turned. Raises ImportError as `pixels` does.
        """
        if self.orientation == 1:
            return compressed_mask(self.segmentation, self.size)
        return encode_mask(self.pixels())


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """A box, xyxy, within its image, and what is in it."""

    box: Box
    category: Any  # the id of one of the file's categories, None where the annotation names none
    label: int | None = None  # the place of the category in the source's `classes`
    is_crowd: bool = False  # of many things, which nobody is asked to tell apart
    mask: StoredMask | None = None
    fields: Mapping[str, Any]  # as the file has them


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedImage:
    """An image, boxes in the pixels of the upright one, whose (height, width) is `size`."""

    path: Path
    size: Size
    annotations: tuple[Annotation, ...]
    fields: Mapping[str, Any]  # as the file has them


def words(size: Size) -> str:
    """(height, width) as people say it: 640 x 480 is wide."""
    return f"{size[1]} x {size[0]}"
