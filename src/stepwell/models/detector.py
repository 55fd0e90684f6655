"""Detectors as models of transformers: a backbone, and the heads of Mask R-CNN, Cascade Mask R-CNN or DINO.

PIIP, arXiv 2501.07783, section IV-A. Letters: B batch, (H, W) the padded batch in pixels, N detections of the
image that has most, n objects of an image, m side of a mask inside its box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from stepwell.heads.detection import DetectionHead
from stepwell.models.backbones import feature_maps
from stepwell.models.dense_config import StepwellDetectorConfig
from stepwell.models.detection_processor import detections_above
from stepwell.models.masks import CroppedMasks
from stepwell.models.predicting import Choice, best_first
from stepwell.models.predictions import Detections
from stepwell.models.tiled import detect_in_tiles
from stepwell.models.with_head import BackboneWithHead, padded, valid_sizes
from stepwell.structures import Extent, FoundObjects, Objects, Size
from stepwell.views.resize import padded_size
from stepwell.views.tiling import Tiles

__all__ = ["DetectorOutput", "StepwellForInstanceSegmentation", "StepwellForObjectDetection"]


@dataclass
class DetectorOutput(ModelOutput):
    """What is found in each image, best first; places that an image does not fill have label -1.

    pred_boxes are xyxy, in parts of the image's width and height without padding. pred_masks are
    probabilities inside each box. losses: the terms whose sum the loss is.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    scores: Tensor | None = None  # (B, N)
    labels: Tensor | None = None  # (B, N)
    pred_boxes: Tensor | None = None  # (B, N, 4)
    pred_masks: Tensor | None = None  # (B, N, m, m)


class StepwellForObjectDetection(BackboneWithHead[Detections]):
    """Boxes, and masks where the head has them."""

    config_class = StepwellDetectorConfig
    head: DetectionHead

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> DetectorOutput:
        """pixel_values (B, 3, H, W), normalised, each image at the top left and zeros beside it.

        pixel_mask: (B, H, W), 1 where there is image; None: everywhere. labels: of each image, as the DETRs
        of transformers take them: `class_labels` (n,), `boxes` (n, 4) as centre, width and height in parts of
        the image, and `masks` (n, h, w) in its pixels for heads with masks. Losses are of the batch, padded
        as its largest image needs, detections of each image alone; while training there are none beside the
        losses. The last three arguments, which users of transformers hand over, change nothing. Raises
        ValueError for labels that do not fit.
        """
        divisor = self.config.image_settings.size_divisor
        pixels = padded(pixel_values, divisor, self.smallest)
        extents = [
            Extent(size, padded_size(size, divisor, self.smallest))
            for size in valid_sizes(pixel_values, pixel_mask)
        ]
        outputs: dict[str, Any] = {}
        if labels is not None:
            size = (pixels.shape[-2], pixels.shape[-1])
            objects = _objects(labels, extents, size, self.config.num_labels)
            height, width = (max(extent.padded[axis] for extent in extents) for axis in (0, 1))
            maps = feature_maps(self.backbone, pixels[..., :height, :width])  # heads tell sizes by extents
            with self.own_precision():
                outputs["losses"] = self.head(maps, extents, objects)
            outputs["loss"] = torch.stack(list(outputs["losses"].values())).sum()
        if labels is None or not self.training:
            outputs |= _stacked(self._found(pixels, extents), extents)
        return DetectorOutput(**outputs)

    def score(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
        """What the head's `score` gives."""
        padded_to = (pixels.shape[-2], pixels.shape[-1])
        extents = [Extent(size, padded_to) for size in sizes]
        with self.own_precision():
            return self.head.score(feature_maps(self.backbone, pixels), extents)

    def _predict_batch(self, images: Sequence[Image], choice: Choice) -> list[Detections]:
        return self._detections(self.image_processor()(list(images), return_tensors="pt"), images, choice)

    def _predict_tiled(self, image: Image, tiles: Tiles, choice: Choice, batch: int) -> Detections:
        processor = self.image_processor()
        of_tile = replace(choice, most=max(choice.most or 0, self.head.max_detections))

        def run(crops: list[Image], sizes: list[Size]) -> list[Detections]:
            return self._detections(processor.batch_of(crops, sizes), crops, of_tile)

        cut = tiles.cut((image.height, image.width), side=processor.tile_side)
        found = detect_in_tiles(image, cut, run, batch=batch)
        return found.select(best_first(found.scores, choice.most))

    def _detections(self, inputs: Any, images: Sequence[Image], choice: Choice) -> list[Detections]:
        """inputs: of the images, as the processor makes them."""
        threshold = 0.5 if choice.threshold is None else choice.threshold
        sizes = [(image.height, image.width) for image in images]
        with self.head.finding(choice.most or self.head.max_detections):
            outputs = self._run(inputs)
        above = detections_above(outputs, threshold, sizes, choice.most)
        return [self._of_image(found, size) for found, size in zip(above, sizes, strict=True)]

    def _of_image(self, found: FoundObjects, size: Size) -> Detections:
        return Detections(
            boxes=found.boxes.cpu(),
            scores=found.scores.cpu(),
            labels=found.labels.cpu(),
            class_names=self.class_names,
            image_size=size,
            masks=None if found.masks is None else CroppedMasks.of(found, size),
        )

    def _found(self, pixels: Tensor, extents: Sequence[Extent]) -> list[FoundObjects]:
        """Of each image in its own padding: more of it would change what is found. Images whose padded sizes
        are equal go together.
        """
        groups: dict[Size, list[int]] = {}
        for i, extent in enumerate(extents):
            groups.setdefault(extent.padded, []).append(i)
        found: dict[int, FoundObjects] = {}
        for (height, width), members in groups.items():
            alike, of_alike = pixels[members, :, :height, :width], [extents[i] for i in members]
            if self.graph is not None:
                scored = self.graph(alike, [extent.valid for extent in of_alike])
                found.update(zip(members, self.head.choose(scored, of_alike), strict=True))
                continue
            maps = feature_maps(self.backbone, alike)
            with self.own_precision():  # of the head as a whole: offloaded weights come when it is called
                found.update(zip(members, self.head(maps, of_alike), strict=True))
        return [found[i] for i in range(len(extents))]


class StepwellForInstanceSegmentation(StepwellForObjectDetection):
    """A detector whose head has masks. Raises ValueError for one without."""

    def __init__(self, config: StepwellDetectorConfig) -> None:
        if not getattr(config.head_settings, "masks", False):
            raise ValueError(
                f"this {config.head['kind']!r} head finds boxes without masks; "
                "load it by AutoModelForObjectDetection"
            )
        super().__init__(config)


def _objects(
    labels: Sequence[Mapping[str, Tensor]], extents: Sequence[Extent], size: Size, num_classes: int
) -> list[Objects]:
    """Labels as transformers has them -> objects in pixels; masks as large as the batch, `size`."""
    if len(labels) != len(extents):
        raise ValueError(f"labels are one set an image, got {len(labels)} for {len(extents)} images")
    return [
        _of_image(given, extent, size, num_classes) for given, extent in zip(labels, extents, strict=True)
    ]


def _of_image(given: Mapping[str, Tensor], extent: Extent, size: Size, num_classes: int) -> Objects:
    classes, boxes, masks = given["class_labels"], given["boxes"], given.get("masks")
    if boxes.shape != (len(classes), 4):
        raise ValueError(
            f"{len(classes)} class_labels need boxes ({len(classes)}, 4), got {tuple(boxes.shape)}"
        )
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(f"class_labels are 0 to {num_classes - 1}, got {classes.tolist()}")
    if not bool((boxes[:, 2:] > 0).all()):
        raise ValueError(
            f"boxes need a width and a height, got {boxes[:, 2:].tolist()}; leave such objects out"
        )
    height, width = extent.valid
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([centre - half, centre + half], 1) * boxes.new_tensor([width, height, width, height])
    if masks is not None:
        if len(masks) != len(classes) or masks.shape[1] > size[0] or masks.shape[2] > size[1]:
            raise ValueError(
                f"{len(classes)} class_labels need masks of at most {size[0]}x{size[1]} pixels, "
                f"got {tuple(masks.shape)}"
            )
        masks = F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1]))
    return Objects(corners, classes, masks)


def _stacked(found: Sequence[FoundObjects], extents: Sequence[Extent]) -> dict[str, Tensor | None]:
    """What is found in each image as tensors of the batch, filled up."""
    boxes = [
        image.boxes / image.boxes.new_tensor([extent.valid[1], extent.valid[0]] * 2)
        for image, extent in zip(found, extents, strict=True)
    ]
    masks = [image.masks for image in found if image.masks is not None]
    return {
        "scores": pad_sequence([image.scores for image in found], batch_first=True),
        "labels": pad_sequence([image.labels for image in found], batch_first=True, padding_value=-1),
        "pred_boxes": pad_sequence(boxes, batch_first=True),
        "pred_masks": pad_sequence(masks, batch_first=True) if masks else None,
    }
