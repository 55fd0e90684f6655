"""What detectors and segmenters are built by, beside backbones: settings of heads and of their images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from stepwell.heads.cascade import CascadeConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.models.vision import STRICT, Deviations
from stepwell.structures import Statistics

__all__ = ["DetectionImages", "DetectionSettings", "SegmentationImages"]

DetectionSettings = Annotated[RcnnConfig | CascadeConfig | DinoConfig, Field(discriminator="kind")]
"""Settings of a detection head."""
Pixels = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DetectionImages:
    """How a detector's images are prepared: as large as both limits allow, the aspect kept; normalised;
    padded by zeros at the right and the bottom.
    """

    long_limit: Pixels = 1333
    short_limit: Pixels = 800
    size_divisor: Pixels = 32  # of the sides of a padded image
    image_mean: Statistics | None = None  # None: the backbone's
    image_std: Deviations | None = None

    def __post_init__(self) -> None:
        if self.short_limit > self.long_limit:
            raise ValueError(
                f"short_limit {self.short_limit} is above long_limit {self.long_limit}; exchange them"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentationImages:
    """How a segmenter's images are prepared, and looked at. window: side of the windows that slide over an
    image, 0 for none; stride: from one to the next.
    """

    short_side: Pixels = 512
    window: Annotated[int, Field(ge=0)] = 512
    stride: Pixels = 341
    image_mean: Statistics | None = None
    image_std: Deviations | None = None

    def __post_init__(self) -> None:
        if 0 < self.window < self.stride:
            raise ValueError(f"a stride of {self.stride} leaves gaps between windows of {self.window} pixels")
