"""Feature maps of networks that have no visual tokens: backbones, and those below detectors and segmenters.

A picture is prepared as the network's own image processor does it, and padded to whole cells at the right and
the bottom, as for its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from stepwell.models.backbones import outline
from stepwell.models.engine import device_of
from stepwell.models.perception import PyramidBackbone
from stepwell.models.vision import fitted
from stepwell.models.with_head import BackboneWithHead, in_whole_cells, padded
from stepwell.ops.ragged import by_shape
from stepwell.structures import FeatureMap, View

__all__ = ["has_maps", "maps_of"]


def has_maps(model: Any) -> bool:
    """Whether `maps_of` takes it."""
    return isinstance(model, PyramidBackbone | BackboneWithHead)


@torch.no_grad()
def maps_of(model: Any, images: Sequence[Image], *, batch: int) -> list[tuple[FeatureMap, ...]]:
    """Of each RGB picture its maps, finest first, named as the backbone's stages.

    Pictures whose prepared sizes are alike go through together, `batch` at most.
    """
    backbone = model.backbone if isinstance(model, BackboneWithHead) else model
    strides = outline(backbone)[1]
    found: list[tuple[FeatureMap, ...]] = []
    for first in range(0, len(images), batch):
        part = images[first : first + batch]
        inputs = [_input(model, image) for image in part]
        maps = by_shape(lambda pixels: backbone(fitted(pixels, backbone)).feature_maps, inputs)
        found += [
            _named(backbone.out_features, of_image, strides, pixels, model, image)
            for of_image, pixels, image in zip(maps, inputs, part, strict=True)
        ]
    return found


def _input(model: Any, image: Image) -> Tensor:
    """(3, H, W), normalised and padded, on the model's device."""
    pixels: Tensor = model.image_processor()([image], return_tensors="pt")["pixel_values"]
    if isinstance(model, BackboneWithHead):
        divisor = getattr(model.config.image_settings, "size_divisor", model.divisor)
        whole = padded(pixels, divisor, model.smallest)
    else:
        whole = in_whole_cells(pixels, model)
    return whole[0].to(device_of(model))


def _named(
    names: Sequence[str],
    maps: Sequence[Tensor],
    strides: Sequence[float],
    pixels: Tensor,
    model: Any,
    image: Image,
) -> tuple[FeatureMap, ...]:
    """box: of the picture and the padding beside it, in the picture's pixels."""
    size = (image.height, image.width)
    prepared = model.image_processor().prepared_size(size) if isinstance(model, BackboneWithHead) else size
    height, width = pixels.shape[-2:]
    box = (0.0, 0.0, width * size[1] / prepared[1], height * size[0] / prepared[0])
    return tuple(
        FeatureMap(
            one, View(name=name, size=(height, width), box=box, grid=(one.shape[1], one.shape[2])), stride
        )
        for name, one, stride in zip(names, maps, strides, strict=True)
    )
