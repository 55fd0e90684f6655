"""The networks in front of detection and segmentation heads: ours, timm's and those of transformers.

A backbone is what transformers' AutoBackbone builds of a configuration: `PyramidBackbone` of ours, a
TimmBackbone, a Swin. Heads have to know how wide its maps are, and how many pixels a cell has.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel

from stepwell.models.dense import DenseSettings
from stepwell.models.perception import PyramidBackbone, PyramidBackboneConfig
from stepwell.models.vision import fitted
from stepwell.ops.double import AnyMap
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, Statistics

__all__ = ["build_backbone", "feature_maps", "find_backbone", "outline", "smallest_side", "statistics"]

PROBED = 256
"""Side in pixels of the image that tells a foreign backbone's strides, where it names no size of its own."""


def find_backbone(given: PreTrainedConfig | DenseSettings | dict[str, Any] | None) -> PreTrainedConfig:
    """A backbone's configuration, by itself, by its JSON, or by our settings; None is a small pyramid.

    Raises ValueError for anything else.
    """
    if given is None or isinstance(given, DenseSettings):
        return PyramidBackboneConfig(pyramid=given)
    if isinstance(given, PreTrainedConfig):
        return given
    if not isinstance(given, dict) or "model_type" not in given:
        raise ValueError(
            "backbone_config is DenseSettings, a configuration of transformers, or its JSON with a "
            f"model_type, got {type(given).__name__}"
        )
    return AutoConfig.for_model(**given)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """With random weights. Raises ValueError for a network that is no backbone to transformers."""
    try:
        return cast(PreTrainedModel, AutoBackbone.from_config(config))
    except (AttributeError, ValueError) as error:
        if isinstance(config, PyramidBackboneConfig):
            raise
        raise ValueError(f"transformers has no backbone {config.model_type!r}: {error}") from None


def outline(backbone: PreTrainedModel) -> tuple[list[int], list[float]]:
    """Widths of the maps that leave, finest first, and their strides in pixels of the image."""
    if isinstance(backbone, PyramidBackbone):
        kept = [backbone.stage_names.index(name) for name in backbone.out_features]
        strides = [backbone.pyramid.strides[i] for i in kept]
        return [backbone.pyramid.dims[i] for i in kept], strides
    with torch.device("meta"), torch.no_grad():
        network = build_backbone(backbone.config).eval()
        side = getattr(backbone.config, "image_size", None) or PROBED
        height, width = (side, side) if isinstance(side, int) else side
        maps = network(torch.empty(1, 3, height, width)).feature_maps
    return [x.shape[1] for x in maps], [float(round(height / x.shape[2])) for x in maps]


def smallest_side(backbone: PreTrainedModel) -> int:
    """Of an image in pixels: every branch of a pyramid of ours sees at least a cell of it. 1 for others."""
    if not isinstance(backbone, PyramidBackbone):
        return 1
    pyramid = backbone.pyramid
    coarsest = [encoder.spec.strides[-1] for encoder in pyramid.encoder.encoders]
    return max(math.ceil(stride / ratio) for stride, ratio in zip(coarsest, pyramid.ratios, strict=True))


def feature_maps(backbone: PreTrainedModel, pixels: Tensor) -> tuple[AnyMap, ...]:
    """(B, 3, H, W), normalised, in any precision -> maps (B, C, h, w), finest first."""
    asked = {"finish": False} if isinstance(backbone, PyramidBackbone) else {}
    maps: tuple[AnyMap, ...] = backbone(fitted(pixels, backbone), **asked).feature_maps
    return maps


def statistics(config: PreTrainedConfig) -> tuple[Statistics, Statistics]:
    """Mean and std that a backbone's images are normalised with: ImageNet's where it does not say."""
    if isinstance(config, PyramidBackboneConfig):
        return config.settings.statistics
    return IMAGENET_MEAN, IMAGENET_STD
