"""The inverse feature pyramid: a ViT's map, enlarged step by step under the guidance of its image.

LLaVA-UHD v2, arXiv 2412.13871, section 3.1; the guided stage is FeatUp's joint bilateral upsampling (arXiv
2403.10516, section 3.2.1). Equation numbers are LLaVA-UHD v2's. Where its paper and its released code differ,
both are here, and the defaults are the code's.
Letters: B batch, C channels, (h, w) the map that comes in, (H, W) = (2h, 2w) the map that goes out, R the
radius of a kernel, K = 2R + 1 its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.linear import Linear, is_plain
from stepwell.ops.adaptive_conv import adaptive_upsample, neighbour_products
from stepwell.ops.double import double_map
from stepwell.ops.precision import at_least_single

__all__ = [
    "BilinearStage",
    "Correction",
    "DeconvolutionStage",
    "GuidedStage",
    "InversePyramid",
    "KernelConfig",
    "Level",
    "UpsamplerConfig",
    "build_upsampler",
]

CORRECTION = 0.1  # what the learned corrections of kernels and of maps are multiplied by


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KernelConfig:
    """How a guided stage weighs a pixel's neighbours.

    distance: counted from -1 to 1 over the kernel, or in pixels. similarity: the products of guidance keys
    times exp(temperature), or divided by sigma squared. normalise: the kernel is divided by its sum, or by
    the number of its pixels. correction: a learned one is added. The paper has the second of each, and no
    correction.
    """

    radius: Annotated[int, Field(ge=1)] = 3
    key_dim: Annotated[int, Field(ge=1)] = 32
    distance: Literal["relative", "pixels"] = "relative"
    similarity: Literal["temperature", "sigma"] = "temperature"
    normalise: Literal["sum", "count"] = "sum"
    correction: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UpsamplerConfig:
    """An inverse pyramid. corrections: of the maps that are delivered: "code" corrects the last one, and each
    of three (the official 8x stack); the paper has "none". dropout: before a correction of a map.
    """

    kind: Literal["guided", "bilinear", "deconvolution"] = "guided"
    kernel: KernelConfig = field(default_factory=KernelConfig)
    corrections: Literal["code", "last", "each", "none"] = "code"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class GuidedStage(nn.Module):
    """Twice the size: every pixel is a mean of its neighbours, weighed by their distance and by how similar
    the image is there.
    """

    def __init__(self, config: KernelConfig | None = None, *, guidance_dim: int = 3) -> None:
        super().__init__()
        self.config = config = config or KernelConfig()
        neighbours = (2 * config.radius + 1) ** 2
        self.keys = _network(guidance_dim, config.key_dim, config.key_dim, config.dropout)
        self.similarity = nn.Parameter(torch.zeros(1))  # FSDP shards no scalars
        self.distance_sigma = nn.Parameter(torch.ones(1))
        self.correction = (
            _network(neighbours + guidance_dim, neighbours, neighbours, config.dropout)
            if config.correction
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.similarity, float(self.config.similarity == "sigma"))
        nn.init.ones_(self.distance_sigma)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x (B, C, h, w), guidance (B, 3, H, W) -> (B, C, H, W): equation 2."""
        return adaptive_upsample(x, self.kernels(guidance))

    def kernels(self, guidance: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K*K, H, W), in fp32 at least."""
        kernels = self.similarities(guidance) * self.distances()[:, None, None]
        if self.config.normalise == "sum":
            kernels = kernels / kernels.sum(1, keepdim=True).clamp(min=1e-7)
        else:
            kernels = kernels / kernels.shape[1]
        if self.correction is not None:
            seen = torch.cat([kernels.to(guidance.dtype), guidance], dim=1)
            kernels = kernels + CORRECTION * self.correction(seen)
        return kernels

    def similarities(self, guidance: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K*K, H, W): a softmax over each pixel's neighbours, equation 9."""
        products = neighbour_products(self.keys(guidance), self.config.radius)
        if self.config.similarity == "temperature":
            scale = self.similarity.to(products.dtype).exp().clamp(1e-4, 1e4)
        else:
            scale = self.similarity.to(products.dtype) ** -2
        return (scale * products).softmax(1)

    def distances(self) -> Tensor:
        """(K*K,): a Gaussian of the distance from the middle, equation 8."""
        sigma = self.distance_sigma.to(at_least_single(self.distance_sigma.dtype))
        radius = self.config.radius
        unit = radius if self.config.distance == "relative" else 1
        steps = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype) / unit
        return (-(steps[:, None] ** 2 + steps**2).flatten() / (2 * sigma**2)).exp()


class BilinearStage(nn.Module):
    """Twice the size, without weights and without a look at the image."""

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """As of `GuidedStage`."""
        size = (guidance.shape[-2], guidance.shape[-1])
        exact = x.to(at_least_single(x.dtype))
        return F.interpolate(exact, size, mode="bilinear", align_corners=False).to(x.dtype)


class DeconvolutionStage(nn.ConvTranspose2d):
    """Twice the size by a learned 2x2 block of every cell, without a look at the image."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 2, stride=2)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:  # type: ignore[override]
        """As of `GuidedStage`."""
        assert self.bias is not None
        return double_map(x, self.weight, self.bias)


class Level(NamedTuple):
    """A map of the pyramid, and the layer that corrects it, where one does.

    Whoever reads the map through a linear layer may join the two layers instead of correcting every pixel.
    """

    map: Tensor  # (B, C, H, W)
    correction: Correction | None = None

    def corrected(self) -> Tensor:
        """(B, C, H, W)."""
        return self.map if self.correction is None else self.correction(self.map)


class InversePyramid(nn.Module):
    """Stages one behind the other, each guided by the whole image in its own size.

    corrections: which of the delivered maps are corrected. With "each", a corrected map is where the next
    stage begins, and `forward`, which gives the last map alone, has a correction of its own.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        dim: int,
        *,
        corrections: Literal["last", "each", "none"] = "last",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.is_chained = corrections == "each"
        count = {"last": min(len(stages), 1), "each": len(stages) + 1, "none": 0}[corrections]
        self.corrections = nn.ModuleList(Correction(dim, dropout) for _ in range(count))
        """Of the last map, and before it those of each."""

    def forward(
        self, x: Tensor, image: Tensor, *, every_level: bool = False, stop_gradient: bool = False
    ) -> Tensor | list[Level]:
        """x (B, C, h, w), image (B, 3, p*h, p*w), normalised -> the largest map (B, C, 2^n h, 2^n w); or what
        `levels` gives.
        """
        if every_level:
            return self._levels(x, image, stop_gradient)
        for stage in self.stages:
            x = stage(x, _guidance(image, x))
        for correction in self.corrections[-1:]:
            x = correction(x)
        return x

    def levels(self, x: Tensor, image: Tensor, *, stop_gradient: bool = False) -> list[Level]:
        """The same -> the map of every stage, the smallest first.

        stop_gradient: none reaches a stage from the ones behind it, so that each learns from its own map.
        """
        levels: list[Level] = self(x, image, every_level=True, stop_gradient=stop_gradient)
        return levels  # by a call, so that what brings weights to `forward` brings them

    def _levels(self, x: Tensor, image: Tensor, stop_gradient: bool) -> list[Level]:
        levels: list[Level] = []
        for i, stage in enumerate(self.stages):
            if levels:
                x = levels[-1].corrected() if self.is_chained else levels[-1].map
                x = x.detach() if stop_gradient else x
            is_last = i == len(self.stages) - 1
            correction = None
            if len(self.corrections) and (self.is_chained or is_last):
                correction = cast(Correction, self.corrections[i if self.is_chained else -1])
            level = Level(stage(x, _guidance(image, x)), correction)
            may_wait = correction is None or (correction.is_linear and _keeps_weights(self))
            levels.append(level if may_wait else Level(level.corrected()))
        return levels


def build_upsampler(config: UpsamplerConfig, dim: int, num_stages: int) -> InversePyramid:
    """A pyramid of maps of width `dim`, random weights. Without a stage it delivers nothing."""
    corrections = config.corrections if config.kind == "guided" else "none"
    if corrections == "code":
        corrections = "each" if num_stages == 3 else "last"
    return InversePyramid(
        [_stage(config, dim) for _ in range(num_stages)],
        dim,
        corrections=corrections,
        dropout=config.dropout,
    )


def _stage(config: UpsamplerConfig, dim: int) -> nn.Module:
    if config.kind == "guided":
        return GuidedStage(config.kernel)
    return BilinearStage() if config.kind == "bilinear" else DeconvolutionStage(dim)


class Correction(nn.Module):
    """x + 0.1 * linear(x), pixel by pixel."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.linear = Linear(dim, dim)

    @property
    def is_linear(self) -> bool:
        """Whether `affine` says at the moment what it does."""
        parts = ((self, Correction), (self.linear, Linear), (self.dropout, nn.Dropout2d))
        if not all(is_plain(module, kind) for module, kind in parts):
            return False
        return not self.dropout.training or self.dropout.p == 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        step = self.linear(self.dropout(x).movedim(1, -1)).movedim(-1, 1)
        return torch.add(x, step, alpha=CORRECTION)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The same without dropout, in fp32 at least: a matrix (C, C) and a vector (C,) for every cell."""
        weight, bias = (x.to(at_least_single(x.dtype)) for x in (self.linear.weight, self.linear.bias))
        return torch.eye(len(weight), device=weight.device) + CORRECTION * weight, CORRECTION * bias


def _network(in_dim: int, hidden_dim: int, out_dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_dim, hidden_dim, 1), nn.GELU(), nn.Dropout2d(dropout), nn.Conv2d(hidden_dim, out_dim, 1)
    )


def _keeps_weights(module: nn.Module) -> bool:
    """Whether they are there when a call is over: accelerate's hooks and FSDP may bring them for it alone."""
    return not (hasattr(module, "_hf_hook") or hasattr(module, "unshard"))


def _guidance(image: Tensor, x: Tensor) -> Tensor:
    """The whole image, averaged to twice the size of the map x."""
    return F.adaptive_avg_pool2d(image, (2 * x.shape[-2], 2 * x.shape[-1]))
