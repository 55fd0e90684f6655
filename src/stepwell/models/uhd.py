"""LLaVA-UHD's vision, both versions: an overview and slices of any aspect -> a few tokens of each.

Version 2, arXiv 2412.13871: slices through a ViT, the map of each enlarged step by step under the guidance of
its image, windows of all levels read by queries. Version 1, arXiv 2403.11703, as its code has it, is the
same without the pyramid. Letters: B views of one shape, C width of the encoder, (h, w) its grid, N tokens of
an image, n of a view, D the language model's width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import field
from functools import partial
from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.encoders.catalogue import build_encoder, encoder_spec
from stepwell.encoders.encoder import Encoder
from stepwell.fuse.upsample import InversePyramid, Level, UpsamplerConfig, build_upsampler
from stepwell.fuse.windows import WindowAttention, WindowConfig
from stepwell.models.vision import STRICT, Deviations, VisionConfig, VisionSystem
from stepwell.ops.ragged import by_shape
from stepwell.structures import EncoderSpec, FeatureMap, Statistics, TokenLayout, VisionFeatures
from stepwell.views.region import RegionConfig
from stepwell.views.slices import Separator, SliceGeometry

__all__ = ["V1_WINDOWS", "UhdV1Config", "UhdV2Config", "UhdVision"]

MOST_CELLS = 2**14
"""Of the finest maps that are held at once where no gradient is recorded."""

V1_WINDOWS = WindowConfig(query_sets=1, level_code="none", bias=False)


def _rising(levels: tuple[int, ...]) -> tuple[int, ...]:
    if list(levels) != sorted(set(levels)):
        raise ValueError(f"levels are told once, the coarsest first, got {levels}")
    return levels


def _whole(separator: Separator) -> Separator:
    if not isinstance(separator, str) and min(separator, default=0) < 0:
        raise ValueError(f"ids of tokens are counted from 0, got {list(separator)}")
    return separator


Levels = Annotated[
    tuple[Annotated[int, Field(ge=0, le=4)], ...], Field(min_length=1), AfterValidator(_rising)
]
"""Of the pyramid, that are read: 0 is the encoder's own map, each further one twice the size."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UhdV1Config(VisionConfig):
    """Slices, one encoder, one of its hidden states, queries that read windows of it.

    size: side of a square view; long_side: of the image before it is sliced, None its own. organised,
    newline, comma, before_overview: where tokens and separators stand, as of `SliceGeometry`. mean, std: None
    is the encoder's own.
    """

    adjustable: ClassVar = frozenset(
        {
            *("before_overview", "comma", "long_side", "max_slices"),
            *("mean", "never_split", "newline", "organised", "region", "std"),
        }
    )
    parts: ClassVar = {"vision.branches": "branches", "projector": "projector"}

    kind: Literal["uhd_v1"] = "uhd_v1"
    encoder: str = "clip_l_14_336"
    size: Annotated[int, Field(gt=0)] = 336
    max_slices: Annotated[int, Field(gt=0)] = 7
    never_split: bool = False
    long_side: Annotated[int, Field(gt=0)] | None = None
    select_layer: int = -2  # index into the hidden states, the embedding being the first
    windows: WindowConfig = V1_WINDOWS
    organised: bool = False
    newline: Annotated[Separator, AfterValidator(_whole)] = "\n"
    comma: Annotated[Separator, AfterValidator(_whole)] = ","
    before_overview: Literal["comma", "first"] = "first"
    mean: Statistics | None = None
    std: Deviations | None = None
    region: RegionConfig = field(default_factory=RegionConfig)
    arguments: dict[str, Any] = field(default_factory=dict)  # of the encoder, where the catalogue's differ

    def __post_init__(self) -> None:
        _ = self._read  # whether the encoder has these hidden states

    @property
    def _spec(self) -> EncoderSpec:
        return encoder_spec(self.encoder, self.arguments)

    @property
    def _read(self) -> tuple[int, ...]:
        """The layers whose outputs are maps of the pyramid, the last one first; -1 is the embedding."""
        return (self._spec.layers_before(self.select_layer) - 1,)

    @property
    def _levels(self) -> tuple[int, ...]:
        return (0,)

    @property
    def _stride(self) -> int:
        return self._spec.strides[max(self._read[0], 0)]

    @property
    def largest(self) -> int:
        return self.size

    def geometry(self) -> SliceGeometry:
        spec = self._spec
        return SliceGeometry(
            name=self.encoder,
            side=self.size,
            stride=self._stride,
            max_slices=self.max_slices,
            never_split=self.never_split,
            levels=self._levels,
            token_grid=self.windows.grid,
            organised=self.organised,
            newline=self.newline,
            comma=self.comma,
            before_overview=self.before_overview,
            long_side=self.long_side,
            region=self.region,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
        )

    def build(self, out_dim: int) -> UhdVision:
        return self._build(out_dim, upsampler=None)

    def _build(self, out_dim: int, upsampler: InversePyramid | None) -> UhdVision:
        levels = self._levels
        encoder = build_encoder(self.encoder, **self.arguments)
        dims = [encoder.spec.dims[max(layer, 0)] for layer in self._read]
        projector = WindowAttention(
            [dims[level] if len(dims) > 1 else dims[0] for level in levels],
            out_dim,
            self.windows,
            levels=levels,
        )
        return UhdVision(encoder, upsampler, projector, self.geometry(), layers=self._read, levels=levels)

    def resized(self, sizes: Sequence[int]) -> Self:
        if len(sizes) != 1:
            raise ValueError(f"sizes: views of this vision system have 1 side, got {list(sizes)}")
        return dataclasses.replace(self, size=sizes[0])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UhdV2Config(UhdV1Config):
    """LLaVA-UHD v2: levels of an inverse pyramid above the encoder's map, and windows of all of them.

    upsampler: None takes the maps of the encoder's own stages, each twice the size of the one behind it, for
    an encoder that has them.
    """

    parts: ClassVar = {
        "vision.branches": "branches",
        "vision.upsampler": "upsampler",
        "projector": "projector",
    }

    kind: Literal["uhd_v2"] = "uhd_v2"  # type: ignore[assignment]
    levels: Levels = (0, 1, 2)
    upsampler: UpsamplerConfig | None = field(default_factory=UpsamplerConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    organised: bool = True

    @property
    def _levels(self) -> tuple[int, ...]:
        return self.levels

    @property
    def _read(self) -> tuple[int, ...]:
        (last,) = super()._read
        if self.upsampler is not None or self.levels == (0,):
            return (last,)
        strides = self._spec.strides[: max(last, 0) + 1]  # the embedding has that of the first layer
        wanted = [strides[-1] / 2**level for level in range(self.levels[-1] + 1)]
        if missing := [stride for stride in wanted if stride not in strides]:
            raise ValueError(
                f"{self.encoder} has stages of strides {sorted(set(strides))} and none of {missing[0]:g}; "
                "take fewer levels, another encoder or an upsampler"
            )
        return tuple(len(strides) - 1 - strides[::-1].index(int(stride)) for stride in wanted)

    def build(self, out_dim: int) -> UhdVision:
        if self.upsampler is None:
            return self._build(out_dim, None)
        dim = self._spec.dims[max(self._read[0], 0)]
        return self._build(out_dim, build_upsampler(self.upsampler, dim, self.levels[-1]))


class UhdVision(VisionSystem):
    """layers: of the encoder, whose outputs are its maps, the last one first; levels: those that are read, of
    these maps or of the ones that `upsampler` makes of the last.
    """

    def __init__(
        self,
        encoder: Encoder,
        upsampler: InversePyramid | None,
        projector: WindowAttention,
        geometry: SliceGeometry,
        *,
        layers: Sequence[int],
        levels: Sequence[int],
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cast(nn.Module, encoder)])
        self.upsampler = upsampler
        self.projector: WindowAttention = projector
        self.geometry: SliceGeometry = geometry
        self.layers, self.levels = tuple(layers), tuple(levels)

    @property
    def encoders(self) -> list[Encoder]:
        return cast("list[Encoder]", list(self.branches))

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        """As every vision system's; maps are those of all levels that are read, view after view."""
        seen = iter(by_shape(partial(self._see, with_maps=True), inputs))
        features = []
        for layout in layouts:
            views = [next(seen) for _ in layout.views]
            maps = tuple(
                FeatureMap(map, view, self.geometry.stride / 2**level)
                for view, (_, *maps) in zip(layout.views, views, strict=True)
                for level, map in zip(self.levels, maps, strict=True)
            )
            tokens = self._arranged([tokens for tokens, *_ in views], layout)
            features.append(VisionFeatures(tokens, maps, layout))
        return features

    def forward(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        seen = iter(by_shape(self._see, inputs))
        return [self._arranged([next(seen)[0] for _ in layout.views], layout) for layout in layouts]

    def _see(self, image: Tensor, *, with_maps: bool = False) -> list[Tensor]:
        """(B, 3, H, W) -> tokens (B, n, D), and where asked for the map (B, C, h, w) of each level."""
        kept: list[list[Tensor]] = [[] for _ in self.levels]

        def views() -> Iterator[list[Level]]:
            for levels in self._pyramid(image):
                if with_maps:
                    levels = [Level(level.corrected()) for level in levels]
                    for maps, level in zip(kept, levels, strict=True):
                        maps.append(level.map)
                yield levels

        tokens = self.projector(views())
        return [tokens, *(torch.cat(maps) for maps in kept if maps)]

    def _pyramid(self, image: Tensor) -> Iterator[list[Level]]:
        """The levels that are read, of as many views at a time as may be held."""
        maps = self._maps(image)
        finest = prod(maps[0].shape[-2:]) * 4 ** self.levels[-1]
        step = len(image) if torch.is_grad_enabled() else max(1, MOST_CELLS // finest)
        for part, *views in zip(image.split(step), *(x.split(step) for x in maps), strict=True):
            levels = [Level(view) for view in views]
            if self.upsampler is not None:
                levels += self.upsampler.levels(views[0], part)
            yield [levels[level] for level in self.levels]

    def _maps(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the encoder's maps (B, C, h, w), the last layer's first."""
        (encoder,) = self.encoders
        state, first = encoder.stem(image), 0
        maps: list[Tensor] = []
        for last in reversed(self.layers):
            state, first = encoder.run(state, first, last), last + 1
            maps.insert(0, encoder.to_map(state))
        return maps

    def _arranged(self, views: Sequence[Tensor], layout: TokenLayout) -> Tensor:
        """The tokens (n, D) of the slices and the overview -> (N, D), in the order of the layout's runs."""
        *slices, overview = views
        if slices and self.geometry.organised:
            whole = torch.stack(slices).unflatten(1, self.geometry.token_grid).unflatten(0, layout.tiles)
            slices = [whole.transpose(1, 2).flatten(0, 3)]  # a row of tokens runs through all slices beside
        return torch.cat([*slices, overview])
