"""AnyRes, the baseline of high resolution: tiles of the image beside an overview, all through one encoder.

LLaVA-NeXT (llava-vl.github.io, January 2024, and its code): every view is projected as LLaVA-1.5's one is,
and the tiles' tokens are laid out as they lie in the image. Letters: B views, C width of the encoder, n
tokens of a view, N of an image, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.encoder import Encoder
from stepwell.fuse.tiles import TileMerge
from stepwell.language.projector import build_projector
from stepwell.models.plain import PlainConfig, PlainVision
from stepwell.models.vision import STRICT
from stepwell.ops.ragged import by_shape
from stepwell.structures import FeatureMap, Size, TokenLayout, VisionFeatures
from stepwell.views.anyres import AnyResGeometry, Floor, TileMerging, tile_grids
from stepwell.views.region import RegionConfig

__all__ = ["LLAVA_GRIDS", "AnyResConfig", "AnyResVision"]

Positive = Annotated[int, Field(gt=0)]
Grids = Annotated[
    tuple[tuple[Positive, Positive], ...],
    BeforeValidator(lambda value: tile_grids(value) if isinstance(value, str) else value),
]
"""(rows, columns) each, or a range in LLaVA's notation, columns first, such as "(1x1),...,(6x6)"."""

LLAVA_GRIDS: tuple[Size, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""LLaVA-NeXT's, in the order of its code. transformers reads the same numbers as heights and widths, which
turns each: a small square image then lies on two tiles side by side, not one above the other.
"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AnyResConfig(PlainConfig):
    """LLaVA-NeXT: an overview, and a grid of tiles as large, of one encoder; a hidden state, a projector.

    size: side of a view. grids, merge, max_tiles, floor, framing: as of `AnyResGeometry`; of equally good
    grids the first is taken. mean, std: None is the encoder's own.
    """

    adjustable: ClassVar = PlainConfig.adjustable | {"floor", "grids", "max_tiles", "region"}
    parts: ClassVar = {"vision.branches": "branches", "vision.merge": "merge", "projector": "projector"}

    kind: Literal["anyres"] = "anyres"  # type: ignore[assignment]
    framing: Literal["squeeze", "pad", "crop"] = "squeeze"
    grids: Grids = LLAVA_GRIDS
    merge: TileMerging = "spatial_unpad"
    max_tiles: Positive | None = None
    floor: Floor = "exact"
    region: RegionConfig = field(default_factory=RegionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tiles is not None and self.merge != "spatial_unpad":
            raise ValueError(f"max_tiles is of merge 'spatial_unpad', and merge is {self.merge!r}")

    def geometry(self) -> AnyResGeometry:  # type: ignore[override]
        spec = self._spec
        return AnyResGeometry(
            side=self.size,
            stride=spec.strides[self._last],
            framing=self.framing,
            grids=self.grids,
            merge=self.merge,
            max_tiles=self.max_tiles,
            floor=self.floor,
            region=self.region,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
        )

    def build(self, out_dim: int) -> AnyResVision:
        encoder = build_encoder(self.encoder, **self.arguments)
        projector = build_projector(self.projector, encoder.spec.dims[self._last], out_dim)
        merge = TileMerge(out_dim, newline=self.merge == "spatial_unpad")
        return AnyResVision(encoder, projector, merge, self.geometry(), num_layers=self.num_layers)


class AnyResVision(PlainVision):
    """projector: (B, n, C) -> (B, n, D); num_layers: of the encoder, that run."""

    def __init__(
        self,
        encoder: Encoder,
        projector: nn.Module,
        merge: TileMerge,
        geometry: AnyResGeometry,
        *,
        num_layers: int,
    ) -> None:
        super().__init__(encoder, projector, geometry.overview, num_layers=num_layers)
        self.merge = merge
        self.geometry: AnyResGeometry = geometry

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        seen = iter(by_shape(self._encode, inputs))
        features = []
        for layout in layouts:
            tokens, maps = zip(*(next(seen) for _ in layout.views), strict=True)
            of_views = (FeatureMap(x, v, self.stride) for x, v in zip(maps, layout.views, strict=True))
            features.append(VisionFeatures(self._arranged(tokens, layout), tuple(of_views), layout))
        return features

    def _arranged(self, views: Sequence[Tensor], layout: TokenLayout) -> Tensor:
        """The tokens (n, D) of the tiles and the overview -> (N, D), those of the overview first."""
        *tiles, overview = views
        plan = self.geometry.plan(layout.fine_size)
        if plan is None:
            return self.merge.alone(overview)
        if self.geometry.merge == "flat":
            return torch.cat([overview, *tiles])
        merged: Tensor = self.merge(
            overview,
            tiles,
            grid=plan.grid,
            tile=self.geometry.tile_cells,
            kept=plan.kept,
            size=plan.cells,
        )
        return merged
