"""The baseline: one view, one encoder, one of its hidden states, a projector.

LLaVA-1.5, arXiv 2310.03744, section 3.2: CLIP ViT-L/14 at 336 pixels, the second to last hidden state without
its class token, a two-layer MLP. Letters: B batch, N tokens, D the language model's width, (h, w) the size of
an input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.encoders.catalogue import build_encoder, encoder_spec
from stepwell.encoders.encoder import Encoder
from stepwell.language.projector import build_projector
from stepwell.models.vision import STRICT, Deviations, VisionConfig, VisionSystem
from stepwell.ops.ragged import by_shape
from stepwell.structures import EncoderSpec, FeatureMap, Statistics, TokenLayout, VisionFeatures
from stepwell.views.pyramid import Framing, PyramidGeometry

__all__ = ["PlainConfig", "PlainVision"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlainConfig(VisionConfig):
    """LLaVA-1.5: one view, one encoder, a hidden state, a projector. mean, std: None is the encoder's own."""

    adjustable: ClassVar = frozenset({"framing", "mean", "std"})
    parts: ClassVar = {"vision.branches": "branches", "projector": "projector"}

    kind: Literal["plain"] = "plain"
    encoder: str = "clip_l_14_336"
    size: Annotated[int, Field(gt=0)] = 336
    framing: Framing = "pad"
    select_layer: int = -2  # index into the hidden states, the embedding being the first
    projector: Annotated[str, Field(pattern=r"^(linear|mlp[1-9]\d*x_gelu|identity)$")] = "mlp2x_gelu"
    mean: Statistics | None = None
    std: Deviations | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the encoder, where the catalogue's differ

    def __post_init__(self) -> None:
        self._spec.layers_before(self.select_layer)

    @property
    def _spec(self) -> EncoderSpec:
        return encoder_spec(self.encoder, self.arguments)

    @property
    def num_layers(self) -> int:
        """Layers that run: those before the hidden state that is read."""
        return self._spec.layers_before(self.select_layer)

    @property
    def _last(self) -> int:
        """The layer whose width and stride the hidden state has; the embedding has those of the first."""
        return max(self.num_layers - 1, 0)

    @property
    def largest(self) -> int:
        return self.size

    def geometry(self) -> PyramidGeometry:
        spec = self._spec
        return PyramidGeometry(
            names=(self.encoder,),
            sides=(self.size,),
            strides=(spec.strides[self._last],),
            framing=self.framing,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
            min_cells=max(1, spec.window),
        )

    def build(self, out_dim: int) -> PlainVision:
        encoder = build_encoder(self.encoder, **self.arguments)
        projector = build_projector(self.projector, encoder.spec.dims[self._last], out_dim)
        return PlainVision(encoder, projector, self.geometry(), num_layers=self.num_layers)

    def resized(self, sizes: Sequence[int]) -> Self:
        if len(sizes) != 1:
            raise ValueError(f"sizes: views of this vision system have 1 side, got {list(sizes)}")
        return dataclasses.replace(self, size=sizes[0])

    def as_papers_count(self) -> Self:
        """They count all layers, also those behind the one that is read."""
        return dataclasses.replace(self, select_layer=-1)


class PlainVision(VisionSystem):
    """A vision system with one branch.

    projector: (B, N, C) -> (B, N, D); num_layers: of the encoder, that run.
    """

    def __init__(
        self, encoder: Encoder, projector: nn.Module, geometry: PyramidGeometry, *, num_layers: int
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cast(nn.Module, encoder)])
        self.projector = projector
        self.geometry = geometry
        self.num_layers = num_layers
        (self.stride,) = geometry.strides

    @property
    def encoders(self) -> list[Encoder]:
        return cast("list[Encoder]", list(self.branches))

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        return [
            VisionFeatures(tokens, (FeatureMap(map, layout.views[0], self.stride),), layout)
            for (tokens, map), layout in zip(by_shape(self._encode, inputs), layouts, strict=True)
        ]

    def _encode(self, image: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> tokens (B, N, D), map (B, C, H, W)."""
        (encoder,) = self.encoders
        state = encoder.run(encoder.stem(image), 0, self.num_layers - 1)
        return [self.projector(state.tokens), encoder.to_map(state)]
