"""The configurations of detectors and segmenters, as transformers keeps them: a backbone, a head, and how
images are prepared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

from transformers import AutoConfig, PreTrainedConfig

from stepwell.heads.cascade import CascadeConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.upernet import UperNetConfig
from stepwell.models.backbones import find_backbone, statistics
from stepwell.models.config import checked_format, refuse_unknown
from stepwell.models.dense_heads import DetectionImages, DetectionSettings, SegmentationImages
from stepwell.models.vision import settings_json, validated

__all__ = [
    "StepwellDetectorConfig",
    "StepwellSegmenterConfig",
]


class StepwellDetectorConfig(PreTrainedConfig):
    """backbone_config: as of `find_backbone`; head: a `DetectionSettings` or its JSON, by default Mask R-CNN;
    images: DetectionImages or their JSON. Raises ValueError naming the wrong field.
    """

    model_type = "stepwell_detector"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["losses"]  # Trainer hands the rest to metrics

    def __init__(
        self, backbone_config: Any = None, head: Any = None, images: Any = None, **kwargs: Any
    ) -> None:
        self.stepwell_format = checked_format(kwargs)
        refuse_unknown(kwargs, type(self).__name__)
        self.backbone_config = find_backbone(backbone_config)
        self.head = settings_json(validated(DetectionSettings, head or RcnnConfig(), "head"))
        self.images = settings_json(validated(DetectionImages, images or {}, "images"))
        super().__init__(**kwargs)

    @property
    def head_settings(self) -> RcnnConfig | CascadeConfig | DinoConfig:
        """`head` as the dataclass of its kind."""
        return cast(
            "RcnnConfig | CascadeConfig | DinoConfig", validated(DetectionSettings, self.head, "head")
        )

    @property
    def image_settings(self) -> DetectionImages:
        """`images` as a dataclass, the backbone's statistics in it."""
        images: DetectionImages = validated(DetectionImages, self.images, "images")
        return _with_statistics(images, self.backbone_config)


class StepwellSegmenterConfig(PreTrainedConfig):
    """backbone_config: as of `find_backbone`; head: UperNetConfig or its JSON; images: SegmentationImages or
    their JSON. Raises ValueError naming the wrong field.
    """

    model_type = "stepwell_segmenter"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["losses", "image_sizes"]

    def __init__(
        self, backbone_config: Any = None, head: Any = None, images: Any = None, **kwargs: Any
    ) -> None:
        self.stepwell_format = checked_format(kwargs)
        refuse_unknown(kwargs, type(self).__name__)
        self.backbone_config = find_backbone(backbone_config)
        self.head = settings_json(validated(UperNetConfig, head or {}, "head"))
        self.images = settings_json(validated(SegmentationImages, images or {}, "images"))
        super().__init__(**kwargs)

    @property
    def head_settings(self) -> UperNetConfig:
        """`head` as a dataclass."""
        return cast(UperNetConfig, validated(UperNetConfig, self.head, "head"))

    @property
    def image_settings(self) -> SegmentationImages:
        """`images` as a dataclass, the backbone's statistics in it."""
        images: SegmentationImages = validated(SegmentationImages, self.images, "images")
        return _with_statistics(images, self.backbone_config)


Images = TypeVar("Images", DetectionImages, SegmentationImages)


def _with_statistics(images: Images, backbone: PreTrainedConfig) -> Images:
    mean, std = statistics(backbone)
    return replace(images, image_mean=images.image_mean or mean, image_std=images.image_std or std)
