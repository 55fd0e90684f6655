"""The nouns that every room speaks.

Letters: B batch, N tokens, C width, (H, W) a size in pixels or cells, height first. Boxes are xyxy in source
pixels. The path: a picture has a *layout* (pure integers), the layout's *inputs* are cut from the picture,
and a vision system turns inputs into *visual tokens* in the language model's width, or into *feature maps* by
stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "Box",
    "EncoderSpec",
    "FeatureMaps",
    "Geometry",
    "Size",
    "TokenLayout",
    "TokenMap",
    "TokenRun",
    "View",
    "VisionSystem",
    "VisualTokens",
]

Size = tuple[int, int]
"""(height, width)."""
Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in source pixels."""
FeatureMaps = dict[int, "Tensor"]
"""stride in pixels of the largest view -> map (B, C, H, W), finest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """What others must know of an encoder without touching its weights.

    `dims` and `strides` have one entry per layer ("list entry" of PIIP): width and stride *after* that layer.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    stem_stride: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    window: int = 0  # side of the largest attention window, in cells; 0 where there is none

    def __post_init__(self) -> None:
        if not self.dims or len(self.dims) != len(self.strides):
            raise ValueError(f"need one width and one stride a layer, got {self.dims} and {self.strides}")

    @property
    def depth(self) -> int:
        return len(self.dims)

    @property
    def dim(self) -> int:
        """Width of the last layer's output."""
        return self.dims[-1]

    @property
    def stride(self) -> int:
        """Pixels per cell of the last layer's output."""
        return self.strides[-1]


class TokenMap(NamedTuple):
    """Tokens that know their grid. The class token travels beside them, so that grids stay grids."""

    tokens: Tensor  # (B, H*W, C), row-major
    size: Size  # (H, W) in cells
    class_token: Tensor | None = None  # (B, 1, C)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one encoder sees: its size in pixels, the part of the source shown, the grid of its last layer."""

    name: str
    size: Size
    box: Box
    grid: Size


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRun:
    """A stretch of the visual sequence: `count` visual tokens, or a separator as text or as token ids."""

    count: int = 0
    text: str | None = None
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if [self.count > 0, self.text is not None, self.ids is not None].count(True) != 1:
            raise ValueError(f"a run holds visual tokens, a separator's text or its ids, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """Everything about a picture of one size that can be known before any pixel is read."""

    image_size: Size
    inputs: tuple[Size, ...]  # sizes of the tensors handed to the vision system
    views: tuple[View, ...]  # what the encoders see; some are made from an input inside `forward`
    runs: tuple[TokenRun, ...]

    @property
    def num_tokens(self) -> int:
        """Visual tokens, separators not counted."""
        return sum(run.count for run in self.runs)


class VisualTokens(NamedTuple):
    """What a language model is given for a picture."""

    tokens: Tensor  # (B, N, C) in the language model's width, in the order of the layout's runs
    grid: Size | None = None  # (rows, cols) where the tokens form one grid


class Geometry(Protocol):
    """The part of a vision system that has no weights. Processor and model hold equal ones."""

    def layout(self, size: Size) -> TokenLayout:
        """size = (H, W) of the upright source picture. Raises ValueError where the system cannot take it."""
        ...

    def views(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        """Normalised float tensors (3, h, w), one per entry of `layout.inputs`."""
        ...


class VisionSystem(Geometry, Protocol):
    """Any of the systems: a geometry, and the network behind it."""

    def features(self, views: Sequence[Tensor]) -> FeatureMaps:
        """views: one (B, 3, h, w) per entry of `layout.inputs` -> maps by stride."""
        ...

    def forward(self, views: Sequence[Tensor]) -> VisualTokens:
        """views: one (B, 3, h, w) per entry of `layout.inputs` -> tokens in the language model's width."""
        ...
