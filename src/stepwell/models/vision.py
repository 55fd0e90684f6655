"""From settings to vision systems, dense pyramids and classifiers: where fields meet constructors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from stepwell.encoders.catalogue import build_encoder
from stepwell.fuse.merge import BranchMerge, LastMap, TokenMerge, dense_stacks, linear_stacks, stage_stacks
from stepwell.heads.classify import BranchHeads, MergedHead
from stepwell.heads.neck import FACTORS, SimplePyramid
from stepwell.language.projector import build_projector
from stepwell.models.geometry import PyramidGeometry
from stepwell.models.piip import (
    PiipVision,
    PyramidClassifier,
    PyramidEncoder,
    PyramidFeatures,
    build_interactions,
)
from stepwell.models.plain import PlainVision
from stepwell.models.settings import (
    BranchConfig,
    ClassifierSettings,
    DenseSettings,
    PiipConfig,
    PlainConfig,
    VisionConfig,
)
from stepwell.structures import EncoderSpec, Geometry

__all__ = [
    "build_classifier",
    "build_features",
    "build_geometry",
    "build_pyramid_encoder",
    "build_vision",
    "encoder_spec",
    "merge_dims",
]


def build_geometry(config: VisionConfig) -> Geometry:
    """The weightless part of a vision system, for a processor."""
    if isinstance(config, PlainConfig):
        return _plain_geometry(config, encoder_spec(config.encoder, config.arguments))
    return _piip_geometry(config, [encoder_spec(b.encoder, b.arguments) for b in config.branches])


def build_vision(config: VisionConfig, *, out_dim: int) -> PlainVision | PiipVision:
    """A vision system with random weights whose tokens are `out_dim` wide."""
    if isinstance(config, PlainConfig):
        return _build_plain(config, out_dim)
    return _build_piip(config, out_dim)


def encoder_spec(name: str, arguments: Mapping[str, Any]) -> EncoderSpec:
    """Widths and strides of an encoder of the catalogue, without memory for its weights."""
    with torch.device("meta"):
        return build_encoder(name, **arguments).spec


def _build_plain(config: PlainConfig, out_dim: int) -> PlainVision:
    encoder = build_encoder(config.encoder, **config.arguments)
    geometry = _plain_geometry(config, encoder.spec)
    projector = build_projector(config.projector, encoder.spec.dim, out_dim)
    return PlainVision(encoder, projector, geometry, select_layer=config.select_layer)


def _plain_geometry(config: PlainConfig, spec: EncoderSpec) -> PyramidGeometry:
    return PyramidGeometry(
        names=(config.encoder,),
        sides=(config.size,),
        strides=(spec.stride,),
        framing=config.framing,
        mean=config.mean,
        std=config.std,
        min_cells=max(1, spec.window),
    )


def _build_piip(config: PiipConfig, out_dim: int) -> PiipVision:
    encoder = build_pyramid_encoder(config)
    specs = [branch.spec for branch in encoder.encoders]
    projector = TokenMerge(
        [spec.dim for spec in specs],
        out_dim,
        hidden_dim=config.projector.hidden_dim,
        norm=config.projector.norm,
        num_groups=config.projector.num_groups,
        grid=config.projector.grid,
        place=config.projector.place,
    )
    return PiipVision(encoder, projector, _piip_geometry(config, specs))


def _piip_geometry(config: PiipConfig, specs: Sequence[EncoderSpec]) -> PyramidGeometry:
    return PyramidGeometry(
        names=tuple(branch.encoder for branch in config.branches),
        sides=config.sizes,
        strides=tuple(spec.stride for spec in specs),
        framing=config.framing,
        mean=config.mean,
        std=config.std,
        min_cells=max(config.min_cells, *(spec.window for spec in specs)),
        grid=config.projector.grid,
    )


def build_pyramid_encoder(settings: PiipConfig | DenseSettings | ClassifierSettings) -> PyramidEncoder:
    """Branches with interactions between them, random weights."""
    branches = [build_encoder(branch.encoder, **branch.arguments) for branch in settings.branches]
    ranges = [branch.interactions for branch in settings.branches]
    specs = [branch.spec for branch in branches]
    return PyramidEncoder(branches, build_interactions(specs, ranges, **asdict(settings.interaction)), ranges)


def build_features(settings: DenseSettings) -> PyramidFeatures:
    """A dense pyramid with random weights."""
    encoder = build_pyramid_encoder(settings)
    specs = [branch.spec for branch in encoder.encoders]
    dims = merge_dims(settings, specs)
    strides = [specs[-1].strides[layers[-1]] for layers in _merge_layers(settings, specs)]
    neck = None
    if settings.operations:
        if len(dims) == 1:
            strides, widths = strides * len(settings.operations), [dims[0][0]] * len(settings.operations)
        else:
            widths = [step[0] for step in dims]
        strides = [int(s / FACTORS[op]) for s, op in zip(strides, settings.operations, strict=True)]
        eps = 1e-5 if settings.neck_norm == "groupnorm" else 1e-6
        neck = SimplePyramid(widths, operations=settings.operations, norm=settings.neck_norm, norm_eps=eps)
    return PyramidFeatures(
        encoder,
        [_merge(settings, widths) for widths in dims],
        neck,
        ratios=_ratios(settings.branches),
        strides=strides,
        merge_after=settings.merge_after,
    )


def _merge(settings: DenseSettings, dims: list[int]) -> nn.Module:
    if settings.merge == "none":
        return LastMap()
    stacks = (dense_stacks if settings.merge == "dense" else stage_stacks)(dims)
    if settings.merge_branches is None:
        return BranchMerge(stacks)
    return BranchMerge([stacks[i] for i in settings.merge_branches], branches=settings.merge_branches)


def build_classifier(settings: ClassifierSettings, num_classes: int) -> PyramidClassifier:
    """A classifier with random weights."""
    encoder = build_pyramid_encoder(settings)
    dims = [branch.spec.dim for branch in encoder.encoders]
    if settings.head == "merge":
        head: Any = MergedHead(BranchMerge(linear_stacks(dims)), dims[0], num_classes)
    else:
        head = BranchHeads(dims, num_classes, read=settings.head)
    return PyramidClassifier(encoder, head, ratios=_ratios(settings.branches))


def merge_dims(settings: DenseSettings, specs: Sequence[EncoderSpec]) -> list[list[int]]:
    """For each merge, the width of every branch there; branch 1's is that of the merged map."""
    steps = _merge_layers(settings, specs)
    return [[spec.dims[layer] for spec, layer in zip(specs, layers, strict=True)] for layers in steps]


def _merge_layers(settings: DenseSettings, specs: Sequence[EncoderSpec]) -> list[list[int]]:
    """For each merge, the layer of every branch that it follows."""
    layers = [[branch.interactions[i][1] for branch in settings.branches] for i in settings.merge_after]
    return [*layers, [spec.depth - 1 for spec in specs]]


def _ratios(branches: Sequence[BranchConfig]) -> list[float]:
    """The plain quotients, as in the official code: some lose a pixel when a side is rounded down."""
    return [branch.size / branches[-1].size for branch in branches]
