"""A model and the one picture that it looks at: what its encoders are given, and their maps.

Assistants and perception models (classifiers, backbones, detectors, segmenters) alike, so that nothing behind
this knows what kind of model it looks into. Letters: C width, (h, w) a grid, (H, W) the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stepwell.encoders.encoder import Encoder
from stepwell.models.around import AroundVision
from stepwell.models.ask import Assistant
from stepwell.models.engine import device_of
from stepwell.models.vision import VisionSystem, fitted
from stepwell.structures import Box, FeatureMap, Region, TokenLayout, View, VisionFeatures
from stepwell.views.preprocess import square_box
from stepwell.views.pyramid import image_pyramid
from stepwell.views.region import region_in_pixels

__all__ = ["Point", "Subject", "holds", "subject"]

Point = tuple[float, float]
"""x and y in source pixels."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """encoders: each network once. network: in which encoders and interactions are. views: what is seen, with
    the parts of the picture that they show; tensors (3, h, w): the same, normalised. order: for every encoder
    the views that go through it, in their order. look: one pass -> the maps of all views. assistant: None of
    a perception model.
    """

    picture: Image
    name: str
    network: nn.Module
    encoders: Sequence[Encoder]
    views: tuple[View, ...]
    tensors: Sequence[Tensor]
    order: Sequence[Sequence[int]]
    look: Callable[[], tuple[FeatureMap, ...]]
    statistics: tuple[Sequence[float], Sequence[float]]  # mean and std of the pixels of tensors
    assistant: Assistant | None = None
    layout: TokenLayout | None = None
    region: Region | None = None

    @cached_property
    def features(self) -> VisionFeatures:
        """Of an assistant. Raises ValueError for a model that has no visual tokens."""
        if self.assistant is None:
            raise ValueError(f"{self.name} has no visual tokens: it answers no questions")
        return self.assistant.encode(self.picture, region=self.region)


def subject(
    model: Any, picture: Image, *, name: str = "the model", region: Sequence[float] | None = None
) -> Subject:
    """What `stepwell.load` loads, and an opened picture. region: in pixels, of an assistant of several views.

    Raises ValueError for a model without encoders of pictures, and for a region where there can be none.
    """
    if isinstance(model, Assistant):
        return _of_assistant(model, picture, name, region)
    if region is not None:
        raise ValueError(f"a region is looked at closely by assistants, and {name} is none")
    return _of_perception(model, picture, name)


def holds(view: View, point: Point) -> bool:
    """Whether a view shows a point of the picture."""
    left, top, right, bottom = view.box
    return left <= point[0] <= right and top <= point[1] <= bottom


def _of_assistant(assistant: Assistant, picture: Image, name: str, region: Sequence[float] | None) -> Subject:
    engine, size = assistant.engine, (picture.height, picture.width)
    pixels = None if region is None else region_in_pixels(region, size)
    layout = engine.geometry.layout_of(size, pixels)
    inputs = engine.geometry.inputs(picture, layout)
    vision: VisionSystem = engine.vision
    while isinstance(vision, AroundVision):
        vision = vision.system
    tensors = engine.geometry.views(inputs, layout)
    encoders, order = _order(vision.encoders, tensors)

    @torch.no_grad()
    def look() -> tuple[FeatureMap, ...]:
        return engine.encode(inputs, [layout])[0].maps

    return Subject(
        picture=picture,
        name=name,
        network=vision,
        encoders=encoders,
        views=layout.views,
        tensors=tensors,
        order=order,
        look=look,
        statistics=(engine.geometry.mean, engine.geometry.std),
        assistant=assistant,
        layout=layout,
        region=pixels,
    )


def _order(encoders: Sequence[Encoder], tensors: Sequence[Tensor]) -> tuple[list[Encoder], list[list[int]]]:
    """Each encoder once, with the views that it is given. Views of one shape go through it together
    (ops/ragged.py), in the order of the first of each shape.
    """
    if len(encoders) == len(tensors):
        order: dict[int, list[int]] = {}
        for i, encoder in enumerate(encoders):
            order.setdefault(id(encoder), []).append(i)
        return list({id(encoder): encoder for encoder in encoders}.values()), list(order.values())
    shapes = list(dict.fromkeys(tensor.shape for tensor in tensors))
    return list(encoders[:1]), [sorted(range(len(tensors)), key=lambda i: shapes.index(tensors[i].shape))]


def _of_perception(model: Any, picture: Image, name: str) -> Subject:
    from stepwell.models.perception import PyramidForImageClassification, PyramidPreTrainedModel
    from stepwell.models.with_head import BackboneWithHead, padded

    backbone = model.backbone if isinstance(model, BackboneWithHead) else model
    if not isinstance(model, BackboneWithHead | PyramidPreTrainedModel):
        raise ValueError(f"{name} has no encoders of pictures to look into: it is a {type(model).__name__}")
    model.eval()
    inputs = model.image_processor()([picture], return_tensors="pt")
    pixels, valid = inputs["pixel_values"], tuple(inputs["pixel_values"].shape[-2:])
    frame: Box = (0.0, 0.0, float(picture.width), float(picture.height))
    if "pixel_mask" in inputs:
        mask = inputs["pixel_mask"][0].bool()
        valid = int(mask.any(1).sum()), int(mask.any(0).sum())
        pixels = padded(pixels[..., : valid[0], : valid[1]], model.divisor, model.smallest)
        frame = (0.0, 0.0, frame[2] * pixels.shape[-1] / valid[1], frame[3] * pixels.shape[-2] / valid[0])
    elif isinstance(model, PyramidForImageClassification):
        frame = square_box((picture.height, picture.width), "crop")
    pixels = fitted(pixels.to(device_of(model)), backbone)
    processor = model.image_processor()
    statistics = (processor.image_mean, processor.image_std)
    if isinstance(backbone, PyramidPreTrainedModel):
        pyramid: Any = backbone.pyramid
        tensors = image_pyramid(pixels, pyramid.ratios)
        encoders, order = _order(pyramid.encoder.encoders, [tensor[0] for tensor in tensors])
        strides = [encoder.spec.stride for encoder in pyramid.encoder.encoders]
        names = [f"branch {i + 1}" for i in range(len(tensors))]
        network: nn.Module = pyramid.encoder
        run: Callable[[], Sequence[Tensor]] = partial(_branch_maps, pyramid.encoder, tensors)
    else:
        tensors, encoders, order, network = [pixels], [], [], backbone
        run = partial(_backbone_maps, backbone, pixels)
        strides, names = [1], ["backbone"]
    views = tuple(
        View(
            name=one,
            size=(tensor.shape[-2], tensor.shape[-1]),
            box=frame,
            grid=(tensor.shape[-2] // stride, tensor.shape[-1] // stride),
        )
        for one, tensor, stride in zip(names, tensors, strides, strict=True)
    )

    @torch.no_grad()
    def look() -> tuple[FeatureMap, ...]:
        maps = list(run())
        seen = views if len(views) == len(maps) else views * len(maps)
        return tuple(
            FeatureMap(map[0], view, pixels.shape[-1] / map.shape[-1])
            for map, view in zip(maps, seen, strict=True)
        )

    return Subject(
        picture=picture,
        name=name,
        network=network,
        encoders=encoders,
        views=views,
        tensors=[tensor[0] for tensor in tensors],
        order=order,
        look=look,
        statistics=statistics,
    )


def _branch_maps(encoder: Any, views: Sequence[Tensor]) -> list[Tensor]:
    maps: list[Tensor] = encoder.maps(encoder(views)[-1])
    return maps


def _backbone_maps(backbone: Any, pixels: Tensor) -> Sequence[Tensor]:
    maps: Sequence[Tensor] = backbone(pixels).feature_maps
    return maps
