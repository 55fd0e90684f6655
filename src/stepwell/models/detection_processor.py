"""Images -> batches for detectors, and what a detector finds -> boxes in the pixels of the original images.

Letters: B batch, N places for detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.heads.instances import instance_map
from stepwell.models.perception_processor import PaddedImageProcessor, checked_side, target_pairs
from stepwell.structures import FoundObjects, Size
from stepwell.views.resize import size_within

__all__ = ["StepwellDetectionImageProcessor", "detections_above"]


class StepwellDetectionImageProcessor(PaddedImageProcessor):
    """Of PIIP's detectors (arXiv 2501.07783, by MMDetection): images are resized, larger or smaller, until
    one side reaches its limit, and padded to multiples of `size_divisor`.
    """

    settings = ("long_limit", "short_limit", *PaddedImageProcessor.settings)

    def __init__(
        self, *, long_limit: int = 1333, short_limit: int = 800, size_divisor: int = 32, **kwargs: Any
    ) -> None:
        super().__init__(size_divisor=size_divisor, **kwargs)
        self.long_limit = checked_side(long_limit, "long_limit")
        self.short_limit = checked_side(short_limit, "short_limit")
        if short_limit > long_limit:
            raise ValueError(f"short_limit {short_limit} is above long_limit {long_limit}; exchange them")

    @property
    def tile_side(self) -> int:
        return self.short_limit

    def prepared_size(self, size: Size) -> Size:
        return size_within(size, (self.long_limit, self.short_limit))

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Tensor | Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """outputs: `pred_boxes` (B, N, 4), xyxy, 0..1 of an image without its padding; `scores` and `labels`
        (B, N), labels -1 in places that are not used. target_sizes: (H, W) of every original image.

        Of each image `scores`, `labels` and `boxes` of what scores above the threshold, xyxy in pixels of the
        original image, or in 0..1 without target_sizes. Raises ValueError for another number of sizes.
        """
        found = detections_above(outputs, threshold, target_sizes)
        return [{"scores": one.scores, "labels": one.labels, "boxes": one.boxes} for one in found]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Tensor | Sequence[Size] | None = None,
    ) -> list[dict[str, Any]]:
        """outputs: as of `post_process_object_detection`, with `pred_masks` (B, N, m, m), probabilities
        inside the boxes.

        Of each image its `segmentation` (H, W) and `segments_info` (`instance_map`). Raises ValueError
        without masks or without the sizes of the original images.
        """
        if target_sizes is None:
            raise ValueError("masks are put into images of a known size; give target_sizes, (H, W) of each")
        found = detections_above(outputs, threshold, target_sizes)
        maps = [
            instance_map(
                one,
                (int(size[0]), int(size[1])),
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
            )
            for one, size in zip(found, target_sizes, strict=True)
        ]
        return [{"segmentation": segmentation, "segments_info": segments} for segmentation, segments in maps]


def detections_above(
    outputs: Any,
    threshold: float,
    target_sizes: Tensor | Sequence[Size] | None,
    most: int | None = None,
) -> list[FoundObjects]:
    """As `post_process_object_detection`, with the `pred_masks` (B, N, m, m) of the outputs where there are
    any; of each image at most so many, the first.
    """
    masks = getattr(outputs, "pred_masks", None)
    found = []
    for i, size in enumerate(target_pairs(target_sizes, len(outputs.scores))):
        scores, labels = outputs.scores[i].float(), outputs.labels[i]
        kept = ((labels >= 0) & (scores > threshold)).nonzero().flatten()[:most]
        boxes = outputs.pred_boxes[i][kept].float()
        if size is not None:
            boxes = boxes * torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
        of_image = None if masks is None else masks[i][kept].float()
        found.append(FoundObjects(boxes, scores[kept], labels[kept], of_image))
    return found
