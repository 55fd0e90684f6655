"""A backbone and a head as one model of transformers: what detectors and segmenters share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from stepwell.models.backbones import build_backbone, outline, smallest_side
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.dense_heads import SegmentationImages
from stepwell.models.detection_processor import StepwellDetectionImageProcessor
from stepwell.models.perception import PyramidBackbone, PyramidPreTrainedModel, has_another_processor
from stepwell.models.perception_processor import PaddedImageProcessor, StepwellSegmentationImageProcessor
from stepwell.models.predicting import Kind, Predicts
from stepwell.models.saving import SharedWeights
from stepwell.models.starting_values import keep_built, reset, start_missing
from stepwell.models.vision import NEVER_CUT
from stepwell.ops.precision import without_autocast
from stepwell.structures import Size
from stepwell.views.resize import padded_size

__all__ = ["BackboneWithHead", "in_whole_cells", "padded", "padded_image_processor", "valid_sizes"]


class BackboneWithHead(SharedWeights, Predicts[Kind], PreTrainedModel):
    """Subclasses name their configuration, and say what happens to maps. The head stays in fp32 when a model
    is loaded in half precision, as the official code keeps it. divisor: pixels a cell of the coarsest map.
    smallest: side in pixels of an image of which every branch sees a cell.
    """

    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = NEVER_CUT
    _keep_in_fp32_modules_strict = ["head"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        dims, strides = outline(self.backbone)
        self.divisor = math.ceil(max(strides))
        self.smallest = smallest_side(self.backbone)
        self.head = config.head_settings.build(dims, strides, config.num_labels)
        keep_built(self)
        self.post_init()

    @property
    def parts(self) -> dict[str, str]:
        """Names of parts -> prefixes of parameters: those of vision of a pyramid of ours, or the backbone."""
        named = {"backbone": "backbone"}
        if isinstance(self.backbone, PyramidPreTrainedModel):
            named = {
                part: f"backbone.{prefix}" for part, prefix in self.backbone.parts.items() if part != "head"
            }
        return {**named, "head": "head"}

    def initialize_weights(self) -> None:
        start_missing(self.head)
        if isinstance(self.backbone, PyramidPreTrainedModel):
            start_missing(self.backbone.pyramid)
        super().initialize_weights()

    def _init_weights(self, module: Any) -> None:
        reset(module)

    def image_processor(self) -> PaddedImageProcessor:
        """Of the images that this model takes: the one that it was loaded with, or its configuration's."""
        return self.kept_processor or padded_image_processor(self.config)

    def own_precision(self) -> AbstractContextManager[None]:
        """In which heads compute: that of their parameters, as in the official code, despite autocast."""
        return without_autocast(self.device)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers', with the image processor beside the weights: pipelines take the folder.

        One of another origin that lies there already stays.
        """
        folder = Path(save_directory)
        stays = has_another_processor(
            folder, lambda: padded_image_processor(self.config_class.from_pretrained(folder))
        )
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and not stays:
            self.image_processor().save_pretrained(folder)


def padded_image_processor(
    config: StepwellDetectorConfig | StepwellSegmenterConfig,
) -> PaddedImageProcessor:
    """Of the images that a model of this configuration takes."""
    images = config.image_settings
    assert images.image_mean is not None
    assert images.image_std is not None
    statistics = {"image_mean": images.image_mean, "image_std": images.image_std}
    if isinstance(images, SegmentationImages):
        side = max(images.short_side, images.window)
        return StepwellSegmentationImageProcessor(short_side=side, **statistics)
    return StepwellDetectionImageProcessor(
        long_limit=images.long_limit,
        short_limit=images.short_limit,
        size_divisor=images.size_divisor,
        **statistics,
    )


def padded(pixels: Tensor, divisor: int, smallest: int = 1) -> Tensor:
    """(B, C, H, W) -> the same with zeros at the right and the bottom, as large as `padded_size` says."""
    height, width = pixels.shape[-2:]
    size = padded_size((height, width), divisor, smallest)
    return F.pad(pixels, (0, size[1] - width, 0, size[0] - height))


def in_whole_cells(pixels: Tensor, backbone: PyramidBackbone) -> Tensor:
    """(B, C, H, W) -> `padded`, so that all maps of a backbone have whole cells, and each branch has one."""
    return padded(pixels, math.ceil(max(outline(backbone)[1])), smallest_side(backbone))


def valid_sizes(pixels: Tensor, mask: Tensor | None) -> list[Size]:
    """Of the images (B, C, H, W) without padding. mask: (B, H, W), 1 where there is image; None: everywhere.

    Raises ValueError for a mask of another shape, and for no image at all.
    """
    batch, height, width = len(pixels), pixels.shape[-2], pixels.shape[-1]
    if not batch:
        raise ValueError("pixel_values hold no image; give at least one")
    if mask is None:
        return [(height, width)] * batch
    if tuple(mask.shape) != (batch, height, width):
        raise ValueError(f"pixel_mask is {(batch, height, width)} as the pixels, got {tuple(mask.shape)}")
    is_image = mask.bool()
    return list(zip(is_image.any(2).sum(1).tolist(), is_image.any(1).sum(1).tolist(), strict=True))
