"""PIIP-LLaVA's vision: an image -> its pyramid -> branches in conversation -> one sequence of tokens.

PIIP, arXiv 2501.07783, section III. Letters: B batch, N tokens, D the language model's width, (H, W) the
largest view, C the width of a branch, (h, w) its grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.encoders.encoder import Encoder
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import ProjectorConfig, TokenMerge
from stepwell.models.pyramid import Branches, PyramidEncoder, build_pyramid
from stepwell.models.vision import STRICT, Deviations, VisionConfig, VisionSystem
from stepwell.ops.ragged import by_shapes
from stepwell.structures import Statistics, TokenLayout, VisionFeatures
from stepwell.views.pyramid import Framing, PyramidGeometry
from stepwell.views.region import RegionConfig

__all__ = ["PiipConfig", "PiipVision"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PiipConfig(VisionConfig):
    """PIIP-LLaVA and its relatives: branch 1 is the largest network on the smallest view; the last gives the
    grid.

    mean, std: None is those that branch 1 was pretrained with.
    """

    adjustable: ClassVar = frozenset({"framing", "min_cells", "mean", "std", "region"})
    parts: ClassVar = {
        "vision.branches": "encoder.branches",
        "vision.interactions": "encoder.interactions",
        "projector": "projector",
    }

    kind: Literal["piip"] = "piip"
    branches: Branches
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    framing: Framing = "pad"
    min_cells: Annotated[int, Field(gt=0)] = 1  # framing "aspect": cells of the short side on every branch
    mean: Statistics | None = None
    std: Deviations | None = None
    region: RegionConfig = field(default_factory=RegionConfig)

    @property
    def largest(self) -> int:
        return self.branches[-1].size

    def geometry(self) -> PyramidGeometry:
        specs = [branch.spec for branch in self.branches]
        return PyramidGeometry(
            names=tuple(branch.encoder for branch in self.branches),
            sides=tuple(branch.size for branch in self.branches),
            strides=tuple(spec.stride for spec in specs),
            framing=self.framing,
            mean=self.mean or specs[0].mean,
            std=self.std or specs[0].std,
            min_cells=max(self.min_cells, *(spec.window for spec in specs)),
            grid=self.projector.grid,
            region=self.region,
        )

    def build(self, out_dim: int) -> PiipVision:
        encoder = build_pyramid(self.branches, self.interaction)
        projector = TokenMerge([branch.spec.dim for branch in encoder.encoders], out_dim, self.projector)
        return PiipVision(encoder, projector, self.geometry())

    def sizes_for(self, largest: int) -> list[int]:
        """In the proportions that they have, to the nearest whole number of cells."""
        strides = [branch.spec.stride for branch in self.branches[:-1]]
        exact = [branch.size * largest / self.largest for branch in self.branches[:-1]]
        return [max(1, round(x / stride)) * stride for x, stride in zip(exact, strides, strict=True)] + [
            largest
        ]

    def resized(self, sizes: Sequence[int]) -> PiipConfig:
        if len(sizes) != len(self.branches):
            raise ValueError(f"sizes: this vision system has {len(self.branches)} views, got {list(sizes)}")
        branches = [dataclasses.replace(b, size=size) for b, size in zip(self.branches, sizes, strict=True)]
        return dataclasses.replace(self, branches=tuple(branches))


class PiipVision(VisionSystem):
    """geometry: what the branches see; the input is the largest view, the others are made from it."""

    def __init__(self, encoder: PyramidEncoder, projector: TokenMerge, geometry: PyramidGeometry) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.geometry: PyramidGeometry = geometry

    @property
    def encoders(self) -> list[Encoder]:
        return self.encoder.encoders

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        given = self.geometry.by_image(inputs, layouts)
        return [
            VisionFeatures(tokens, self.geometry.feature_maps(maps, layout), layout)
            for (tokens, *maps), layout in zip(by_shapes(self._encode, given), layouts, strict=True)
        ]

    def _encode(self, image: Tensor, fine: Tensor | None = None, cut: Tensor | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> tokens (B, N, D) and the map (B, C, h, w) of every branch. Of a close-up also the
        view of the cut, and where that lies (B, 4).
        """
        views = self.geometry.pyramid(image, fine)
        (states,) = self.encoder(views, cut=cut)
        maps = self.encoder.maps(states)
        return [self.projector(maps, cut).tokens, *maps]
