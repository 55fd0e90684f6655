"""Segmenters as models of transformers: a backbone and UperNet, on a whole image or in windows that slide.

PIIP, arXiv 2501.07783, section IV-B. Letters: B batch, K classes, (H, W) the padded batch in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from stepwell.heads.sliding import slide
from stepwell.heads.upernet import UperNet
from stepwell.models.backbones import feature_maps
from stepwell.models.dense_config import StepwellSegmenterConfig
from stepwell.models.predicting import Choice
from stepwell.models.predictions import Segmentation, label_dtype
from stepwell.models.tiled import label_in_tiles
from stepwell.models.with_head import BackboneWithHead, padded, valid_sizes
from stepwell.ops.ragged import by_shape
from stepwell.ops.resize import resize_map
from stepwell.structures import Size
from stepwell.views.tiling import Tiles

__all__ = ["SegmenterOutput", "StepwellForSemanticSegmentation"]

MOST_WINDOWS, MOST_WINDOWS_ON_CPU = 4, 1
"""Windows that go through the network together: UperNet holds many maps at a quarter of their size."""


@dataclass
class SegmenterOutput(ModelOutput):
    """losses: the terms whose sum the loss is. Logits of padding are 0."""

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None  # (B, K, H, W)
    image_sizes: Tensor | None = None  # (B, 2), height and width of the images without padding


class StepwellForSemanticSegmentation(BackboneWithHead[Segmentation]):
    """A class for every pixel."""

    config_class = StepwellSegmenterConfig
    head: UperNet

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SegmenterOutput:
        """pixel_values (B, 3, H, W), normalised, each image at the top left and zeros beside it.

        pixel_mask: (B, H, W), 1 where there is image; None: everywhere. labels: (B, H, W), classes and the
        head's ignored label, which padding up to whole cells has. Losses are of the whole batch; logits,
        which training does without, of each image in windows of `config.images`. The last three arguments,
        which users of transformers hand over, change nothing. Raises ValueError for labels that do not fit.
        """
        outputs: dict[str, Any] = {}
        if labels is not None:
            outputs["losses"] = self._losses(pixel_values, labels)
            outputs["loss"] = torch.stack(list(outputs["losses"].values())).sum()
        if labels is None or not self.training:
            sizes = valid_sizes(pixel_values, pixel_mask)
            outputs["logits"] = self._logits(pixel_values, sizes)
            outputs["image_sizes"] = torch.tensor(sizes, device=pixel_values.device)
        return SegmenterOutput(**outputs)

    def _check_choice(self, choice: Choice, tiles: Tiles | None) -> None:
        if choice != Choice():
            raise ValueError(
                "a segmenter gives every pixel a class: it has no threshold and no max_detections"
            )

    def _predict_batch(self, images: Sequence[Image], choice: Choice) -> list[Segmentation]:
        processor: Any = self.image_processor()
        outputs = self._run(processor(list(images), return_tensors="pt"))
        maps = processor.post_process_semantic_segmentation(
            outputs, [(image.height, image.width) for image in images]
        )
        dtype = label_dtype(self.config.num_labels)
        return [Segmentation(labels=x.to("cpu", dtype), class_names=self.class_names) for x in maps]

    def _predict_tiled(self, image: Image, tiles: Tiles, choice: Choice, batch: int) -> Segmentation:
        processor, size = self.image_processor(), (image.height, image.width)

        def run(crops: list[Image], sizes: list[Size]) -> list[Tensor]:
            logits = self._run(processor.batch_of(crops, sizes)).logits
            return [one[:, :height, :width] for one, (height, width) in zip(logits, sizes, strict=True)]

        cut = tiles.cut(size, side=processor.tile_side)
        labels = label_in_tiles(image, cut, run, batch=batch, scaled=tiles.scaled(size))
        return Segmentation(labels=labels, class_names=self.class_names)

    def _losses(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if labels.shape != pixels[:, 0].shape:
            raise ValueError(f"labels are {tuple(pixels[:, 0].shape)}, got {tuple(labels.shape)}")
        count, ignored = self.config.num_labels, self.config.head_settings.ignored_label
        if not torch.compiler.is_compiling():
            is_class = (labels >= 0) & (labels < count) | (labels == ignored)
            if not bool(is_class.all()):
                raise ValueError(f"labels are 0 to {count - 1} or {ignored}, got {int(labels[~is_class][0])}")
        pixels = padded(pixels, self.divisor, self.smallest)  # a backbone would leave out what fills no cell
        beside, below = (pixels.shape[axis] - labels.shape[axis] for axis in (-1, -2))
        filled = F.pad(labels.long(), (0, beside, 0, below), value=ignored)
        maps = feature_maps(self.backbone, pixels)
        with self.own_precision():
            losses = self.head.losses(maps, filled)
        if self.config.head_settings.loss_mean == "all_pixels":  # of the images: none of what is beside them
            losses = {name: loss * (filled.numel() / labels.numel()) for name, loss in losses.items()}
        return losses

    def _logits(self, pixels: Tensor, sizes: Sequence[Size]) -> Tensor:
        """(B, K, H, W); each image by itself, so that a batch changes nothing."""
        images = [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]
        height, width = pixels.shape[-2:]
        return torch.stack(
            [
                F.pad(logits, (0, width - logits.shape[-1], 0, height - logits.shape[-2]))
                for (logits,) in by_shape(lambda alike: [self._looked_at(alike)], images)
            ]
        )

    def _looked_at(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> logits (B, K, h, w)."""
        settings = self.config.image_settings
        if not settings.window:
            return self._whole(images)
        most = MOST_WINDOWS_ON_CPU if images.device.type == "cpu" else MOST_WINDOWS
        window, stride = (settings.window,) * 2, (settings.stride,) * 2
        return slide(self._whole, images, crop=window, stride=stride, most=most)

    def score(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor]:
        """Logits (B, K, h, w) in cells of the finest map."""
        maps = feature_maps(self.backbone, pixels)
        with self.own_precision():
            return (self.head(maps),)

    def _whole(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        pixels = padded(images, self.divisor, self.smallest)
        (logits,) = self.scored(pixels, [(height, width)] * len(images))
        return resize_map(logits, (pixels.shape[-2], pixels.shape[-1]))[..., :height, :width]
