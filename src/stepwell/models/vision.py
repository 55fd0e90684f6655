"""From settings to vision systems: the one place where fields meet constructors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from stepwell.encoders.catalogue import build_encoder
from stepwell.fuse.merge import TokenMerge
from stepwell.language.projector import build_projector
from stepwell.models.config import PiipConfig, PlainConfig, VisionConfig
from stepwell.models.geometry import PyramidGeometry
from stepwell.models.piip import PiipVision, PyramidEncoder, build_interactions
from stepwell.models.plain import PlainVision
from stepwell.structures import EncoderSpec, Geometry

__all__ = ["build_geometry", "build_pyramid_encoder", "build_vision", "encoder_spec"]


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


def build_pyramid_encoder(config: PiipConfig) -> PyramidEncoder:
    """Branches with interactions between them, random weights."""
    branches = [build_encoder(branch.encoder, **branch.arguments) for branch in config.branches]
    ranges = [branch.interactions for branch in config.branches]
    interactions = build_interactions(
        [branch.spec for branch in branches], ranges, **asdict(config.interaction)
    )
    return PyramidEncoder(branches, interactions, ranges)
