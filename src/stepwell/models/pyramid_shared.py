"""A baseline of PIIP: one encoder, with the same weights, sees an image at several sizes.

PIIP, arXiv 2501.07783, figure 1(b): no views talk to each other, and their maps become one sequence of tokens
as in PIIP-LLaVA, all layers of the encoder behind them. `DenseSettings(shared=True)` is the same for dense
tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import ProjectorConfig, TokenMerge
from stepwell.models.piip import PiipVision
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.models.vision import STRICT, VisionConfig
from stepwell.structures import EncoderSpec, Statistics
from stepwell.views.pyramid import Framing, PyramidGeometry
from stepwell.views.region import RegionConfig

__all__ = ["PyramidSharedConfig", "Sides"]


def _rising(sides: tuple[int, ...]) -> tuple[int, ...]:
    if list(sides) != sorted(set(sides)):
        raise ValueError(f"sizes are told once, the smallest first, got {list(sides)}")
    return sides


Sides = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1), AfterValidator(_rising)]
"""Of the views; the largest, of which the others are made, comes last."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PyramidSharedConfig(VisionConfig):
    """One encoder on views of several `sizes`; the last gives the grid. mean, std: None is the encoder's own.

    The projector has a stack for every view, since maps of other scales are other features.
    """

    adjustable: ClassVar = frozenset({"framing", "min_cells", "mean", "std", "region"})
    parts: ClassVar = {"vision.branches": "encoder.branches", "projector": "projector"}

    kind: Literal["pyramid_shared"] = "pyramid_shared"
    encoder: str = "clip_l_14_336"
    sizes: Sides = (336, 672)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    framing: Framing = "pad"
    min_cells: Annotated[int, Field(gt=0)] = 1  # framing "aspect": cells of the short side in every view
    mean: Statistics | None = None
    std: Statistics | None = None
    region: RegionConfig = field(default_factory=RegionConfig)
    arguments: dict[str, Any] = field(default_factory=dict)  # of the encoder, where the catalogue's differ

    @property
    def _branches(self) -> tuple[BranchConfig, ...]:
        """One for every view, all of them the same network."""
        return tuple(
            BranchConfig(encoder=self.encoder, size=size, arguments=self.arguments) for size in self.sizes
        )

    @property
    def _spec(self) -> EncoderSpec:
        return self._branches[0].spec

    def __post_init__(self) -> None:
        _ = self._spec  # whether there is such an encoder

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def geometry(self) -> PyramidGeometry:
        spec, count = self._spec, len(self.sizes)
        return PyramidGeometry(
            names=(self.encoder,) * count,
            sides=self.sizes,
            strides=(spec.stride,) * count,
            framing=self.framing,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
            min_cells=max(self.min_cells, spec.window),
            grid=self.projector.grid,
            region=self.region,
        )

    def build(self, out_dim: int) -> PiipVision:
        encoder = build_pyramid(self._branches, InteractionConfig(), shared=True)
        projector = TokenMerge([self._spec.dim] * len(self.sizes), out_dim, self.projector)
        return PiipVision(encoder, projector, self.geometry())

    def resized(self, sizes: Sequence[int]) -> PyramidSharedConfig:
        if len(sizes) != len(self.sizes):
            raise ValueError(f"sizes: this vision system has {len(self.sizes)} views, got {list(sizes)}")
        return dataclasses.replace(self, sizes=tuple(sizes))
