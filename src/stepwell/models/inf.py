"""INF-LLaVA's vision: local and global crops of an image, encoded apart, that enhance each other.

arXiv 2407.16198, with the settings of its released code as defaults; `PAPER` has those of its text. Letters:
P side of a view, (R, K) the grid of crops, (h, w) the cells of a view, C width of the encoder, N tokens of an
image, D the language model's width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.encoder import Encoder
from stepwell.fuse.dual import DualEnhancement, EnhancementConfig
from stepwell.language.projector import build_projector
from stepwell.layers.zero import zero_through
from stepwell.models.plain import PlainConfig
from stepwell.models.vision import STRICT, VisionSystem
from stepwell.ops.parts import in_parts
from stepwell.structures import FeatureMap, TokenLayout, VisionFeatures
from stepwell.views.crops import CropGeometry, LowView
from stepwell.views.preprocess import Square
from stepwell.views.region import RegionConfig

__all__ = ["InfConfig", "InfVision"]

MOST_VIEWS, MOST_VIEWS_ON_CPU = 16, 1
"""That go through the encoder at once where no gradient is recorded, so that what a pass holds does not grow
with the number of crops.
"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InfConfig(PlainConfig):
    """Crops, one encoder, one of its hidden states, dual-perspective enhancement, a projector.

    size: side P of a view. resolutions: of the image, P itself for the small view of the whole, and a
    multiple of it that is cut into crops; one of them or both (Table 3). max_crops: in place of the multiple,
    crops in the grid that is nearest to the image's aspect. framing: None pads to a square, and bends the
    aspect to a grid that follows it. low_view: made of the fine image, as the code does, or of the source.
    combine: the small view with the enhanced one. enhancement: None for the small view alone, which is
    LLaVA-1.5. small_input: images are first resized to P x P and made large from there, which the released
    inference does by an oversight. every_crop: also those are encoded that cannot reach a token.
    """

    adjustable: ClassVar = PlainConfig.adjustable | {
        *("every_crop", "low_view", "max_crops", "region", "resolutions", "small_input"),
    }
    parts: ClassVar = {
        "vision.branches": "branches",
        "vision.enhancement": "enhancement",
        "projector": "projector",
    }

    kind: Literal["inf"] = "inf"  # type: ignore[assignment]
    resolutions: tuple[Annotated[int, Field(gt=0)], ...] = (336, 1008)
    max_crops: Annotated[int, Field(gt=0)] | None = None
    framing: Square | None = None  # type: ignore[assignment]
    low_view: Literal["sampled", "resized"] = "sampled"
    combine: Literal["mean", "add"] = "mean"
    enhancement: EnhancementConfig | None = field(default_factory=EnhancementConfig)
    small_input: bool = False
    every_crop: bool = False
    region: RegionConfig = field(default_factory=RegionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        stride = self._spec.strides[self._last]
        if self.size < stride:
            raise ValueError(f"size {self.size} is smaller than one cell of {stride} pixels")
        large = [side for side in self.resolutions if side != self.size]
        if len(set(self.resolutions)) < len(self.resolutions) or len(large) > 1:
            raise ValueError(
                f"resolutions {list(self.resolutions)} are {self.size}, a multiple of it, or both"
            )
        if large and large[0] % self.size:
            raise ValueError(f"resolution {large[0]} is no multiple of the view's side {self.size}")
        if large and self.max_crops is not None:
            raise ValueError(
                f"max_crops stands in place of resolution {large[0]}: leave {self.size} or nothing"
            )
        if not self.resolutions and self.max_crops is None:
            raise ValueError("give a resolution, or max_crops")
        if self.max_crops is not None and self.framing not in (None, "squeeze"):
            raise ValueError(f"framing {self.framing!r} makes a square; max_crops follows the aspect")
        if self.has_crops and self.enhancement is None:
            raise ValueError(f"without enhancement there is the small view alone: resolutions [{self.size}]")
        if self.has_crops and self.has_low_view and self._needed.reduce == "none":
            raise ValueError("reduce 'none' keeps every cell, and a small view has fewer: leave out one")
        if self.small_input and self.low_view == "resized":
            raise ValueError("small_input is what the small view would be made of: low_view 'sampled'")

    @property
    def _needed(self) -> EnhancementConfig:
        return self.enhancement or EnhancementConfig()

    @property
    def has_low_view(self) -> bool:
        return self.size in self.resolutions

    @property
    def has_crops(self) -> bool:
        return self.max_crops is not None or self.largest != self.size

    @property
    def largest(self) -> int:
        if self.max_crops is not None:
            return self.size * self.max_crops
        return max(self.resolutions, default=self.size)

    def geometry(self) -> CropGeometry:  # type: ignore[override]
        spec, needed = self._spec, self._needed
        low: LowView = self.low_view if self.has_low_view else "none"
        count = self.largest // self.size
        return CropGeometry(
            name=self.encoder,
            side=self.size,
            stride=spec.strides[self._last],
            framing=self.framing or ("pad" if self.max_crops is None else "squeeze"),
            grid=(count, count) if self.max_crops is None else None,
            max_crops=self.max_crops or 1,
            local_crops=needed.perspectives != "global",
            global_crops="all" if self.every_crop and needed.global_crops != "none" else needed.global_crops,
            low=low,
            enlarged=self.small_input,
            every_cell=needed.reduce == "none",
            region=self.region,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
        )

    def build(self, out_dim: int) -> InfVision:  # type: ignore[override]
        encoder = build_encoder(self.encoder, **self.arguments)
        dim = encoder.spec.dims[self._last]
        return InfVision(
            encoder,
            DualEnhancement(dim, self.enhancement) if self.enhancement is not None else None,
            build_projector(self.projector, dim, out_dim),
            self.geometry(),
            num_layers=self.num_layers,
            combine=self.combine,
        )

    def sizes_for(self, largest: int) -> list[int]:
        """The small view stays beside the crops where there is one."""
        return sorted({self.size, largest} if self.has_low_view else {largest})

    def resized(self, sizes: Sequence[int]) -> Self:
        return dataclasses.replace(self, resolutions=tuple(sizes))


class InfVision(VisionSystem):
    """projector: (..., C) -> (..., D); num_layers: of the encoder, that run."""

    def __init__(
        self,
        encoder: Encoder,
        enhancement: DualEnhancement | None,
        projector: nn.Module,
        geometry: CropGeometry,
        *,
        num_layers: int,
        combine: Literal["mean", "add"],
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cast(nn.Module, encoder)])
        self.enhancement = enhancement
        self.projector = projector
        self.geometry: CropGeometry = geometry
        self.num_layers, self.combine = num_layers, combine

    @property
    def encoders(self) -> list[Encoder]:
        return cast("list[Encoder]", list(self.branches))

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        given = iter(inputs)
        views = [
            view
            for layout in layouts
            for view in self.geometry.views([next(given) for _ in layout.inputs], layout)
        ]
        if not views:
            return []
        most = MOST_VIEWS_ON_CPU if views[0].device.type == "cpu" else MOST_VIEWS
        seen = in_parts(lambda part: self._cells(part[0])[None], torch.stack(views)[None], most=most)[0]
        features = []
        for layout, maps in zip(layouts, seen.split([len(x.views) for x in layouts]), strict=True):
            tokens = self.projector(self._fused(maps, layout).flatten(0, 1))
            shown = zip(maps.movedim(-1, 1), layout.views, strict=True)
            features.append(
                VisionFeatures(
                    tokens, tuple(FeatureMap(map, view, self.geometry.stride) for map, view in shown), layout
                )
            )
        return features

    def _cells(self, views: Tensor) -> Tensor:
        """(B, 3, P, P) -> (B, h, w, C)."""
        (encoder,) = self.encoders
        state = encoder.run(encoder.stem(views), 0, self.num_layers - 1)
        return encoder.to_map(state).movedim(1, -1)

    def _fused(self, maps: Tensor, layout: TokenLayout) -> Tensor:
        """Cells of an image's views (views, h, w, C) -> (h, w, C), or every cell of the grid."""
        grid = self.geometry.grid_of(layout.fine_size)
        if grid == (1, 1):
            if self.enhancement is None or not torch.is_grad_enabled():
                return maps[0]
            return maps[0] + zero_through(self.enhancement).to(maps.dtype)
        assert self.enhancement is not None
        num_local, global_crops, has_low_view = self.geometry.parts(grid)
        local, strided, low = maps[None].split([num_local, len(global_crops), int(has_low_view)], 1)
        enhanced: Tensor = self.enhancement(
            local if num_local else None, strided if global_crops else None, grid
        )[0]
        if self.geometry.low == "none":
            return enhanced
        small = low[0, 0] if has_low_view else strided[0, len(global_crops) // 2]
        both: Tensor = small + enhanced
        return both if self.combine == "add" else both / 2
