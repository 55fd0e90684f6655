"""The nouns that every room speaks.

Letters: B batch, N tokens, C width, D the language model's width, (H, W) a size in pixels or cells, height
first. Boxes are xyxy in source pixels. The path: an image has a *layout* (pure integers); its *inputs* are
the tensors that a vision system is handed, its *views* what the encoders see; a vision system turns inputs
into *visual tokens* in the language model's width, and into feature maps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF_MEAN",
    "HALF_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NO_REGION",
    "Box",
    "EncoderSpec",
    "Extent",
    "FeatureMap",
    "FoundObjects",
    "Geometry",
    "Objects",
    "Region",
    "Size",
    "Statistics",
    "TokenGrid",
    "TokenLayout",
    "TokenMap",
    "TokenRun",
    "View",
    "VisionFeatures",
]

Size = tuple[int, int]
"""(height, width)."""
Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in source pixels."""

Region = tuple[int, int, int, int]
"""A box in whole source pixels."""
NO_REGION: Region = (0, 0, 0, 0)
"""In tensors, of an image that is looked at as a whole."""

Statistics = tuple[float, float, float]
"""Of red, green and blue, for pixels in [0, 1]."""
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN: Statistics = (0.5, 0.5, 0.5)  # pixels in [-1, 1]
HALF_STD: Statistics = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """What others must know of an encoder without touching its weights.

    `dims` and `strides` have one entry per layer ("list entry" of PIIP): width and stride *after* that layer.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    mean: Statistics  # of the pretraining
    std: Statistics
    window: int = 0  # side of the largest attention window, in cells; 0 where there is none

    def __post_init__(self) -> None:
        if not self.dims or len(self.dims) != len(self.strides):
            raise ValueError(f"need one width and one stride a layer, got {self.dims} and {self.strides}")

    @property
    def depth(self) -> int:
        return len(self.dims)

    def layers_before(self, select_layer: int) -> int:
        """Layers that run before a hidden state, told by its index, the embedding being the first.

        Raises ValueError for one that there is not.
        """
        if not -self.depth - 1 <= select_layer <= self.depth:
            raise ValueError(f"select_layer {select_layer} is not one of the {self.depth + 1} hidden states")
        return select_layer % (self.depth + 1)

    @property
    def dim(self) -> int:
        """Width of the last layer's output."""
        return self.dims[-1]

    @property
    def stride(self) -> int:
        """Pixels per cell of the last layer's output."""
        return self.strides[-1]


class TokenMap(NamedTuple):
    """Tokens that know their grid. What has no place in it travels beside them, so that grids stay grids."""

    tokens: Tensor  # (B, H*W, C), row-major
    size: Size  # (H, W) in cells
    class_token: Tensor | None = None  # (B, 1, C)
    registers: Tensor | None = None  # (B, R, C)

    def __repr__(self) -> str:
        beside = {"class_token": self.class_token, "registers": self.registers}
        more = [f"{name}={_outline(tensor)}" for name, tensor in beside.items() if tensor is not None]
        return f"TokenMap({', '.join([f'tokens={_outline(self.tokens)}', f'size={self.size}', *more])})"


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one encoder sees: its size in pixels, the part of the source shown, the grid of its last layer.
    maps: the grids of all its maps, where there are several.
    """

    name: str
    size: Size
    box: Box
    grid: Size
    maps: tuple[Size, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRun:
    """A stretch of the visual sequence: `count` visual tokens, or a separator as text or as token ids."""

    count: int = 0
    text: str | None = None
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if [self.count > 0, self.text is not None, self.ids is not None].count(True) != 1:
            raise ValueError(f"a run holds visual tokens, a separator's text or its ids, got {self}")


class TokenGrid(NamedTuple):
    """Visual tokens that stand for the cells of a grid over a part of the image."""

    box: Box
    rows: tuple[Sequence[int], ...]  # of the visual tokens of each row, separators not counted; -1: none

    @classmethod
    def over(cls, box: Box, size: Size, *, first: int = 0, step: int | None = None) -> TokenGrid:
        """A grid of `size`, row by row from token `first` on. step: tokens from one row to the next, where
        others stand between them.
        """
        starts = [first + row * (step or size[1]) for row in range(size[0])]
        return cls(box, tuple(range(start, start + size[1]) for start in starts))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """Everything about an image of one size that can be known before any pixel is read."""

    image_size: Size
    inputs: tuple[Size, ...]  # sizes of the tensors handed to the vision system
    views: tuple[View, ...]  # what the encoders see; some are made from an input inside `forward`
    runs: tuple[TokenRun, ...]
    tiles: Size = (0, 0)  # rows and columns of the views that tile the image, which come first
    token_grid: Size = (0, 0)  # rows and columns of visual tokens of every view, where all have as many
    grids: tuple[TokenGrid, ...] = ()  # where visual tokens look; some have no place
    region: Region | None = None  # that is looked at closely, where there is one
    cut: Region | None = None  # what the finest views show then: the region and what lies around it

    @property
    def fine_size(self) -> Size:
        """Of what the finest views show, in source pixels."""
        if self.cut is None:
            return self.image_size
        left, top, right, bottom = self.cut
        return bottom - top, right - left

    @property
    def num_visual(self) -> int:
        """Visual tokens; `StepwellProcessor.num_tokens(layout)` counts the tokens of separators too."""
        return sum(run.count for run in self.runs)

    @property
    def num_pixels(self) -> int:
        """Of all inputs together."""
        return sum(height * width for height, width in self.inputs)


class FeatureMap(NamedTuple):
    """A map of one view."""

    map: Tensor  # (C, H, W)
    view: View
    stride: float  # pixels of the input per cell, such as 16 / 0.35

    def __repr__(self) -> str:
        return f"FeatureMap(map={_outline(self.map)}, view={self.view.name!r}, stride={self.stride:g})"


class VisionFeatures(NamedTuple):
    """What a vision system makes of one image."""

    tokens: Tensor  # (N, D) in the order of the layout's runs
    maps: tuple[FeatureMap, ...]  # view after view, of each view the coarsest first
    layout: TokenLayout

    def __repr__(self) -> str:
        maps = [repr(feature_map) for feature_map in self.maps[:3]]
        more = [f"and {len(self.maps) - 3} more"] if len(self.maps) > 3 else []
        return (
            f"VisionFeatures(tokens={_outline(self.tokens)}, maps=({', '.join([*maps, *more])}), "
            f"layout of an image of {self.layout.image_size})"
        )


def _outline(tensor: Tensor) -> str:
    """What fits a line of a screen; anything but a tensor as it is."""
    shape = getattr(tensor, "shape", None)
    return repr(tensor) if shape is None else f"{tuple(shape)} {tensor.dtype}"


class Extent(NamedTuple):
    """Where an image lies in a batch of padded ones: at the top left."""

    valid: Size  # of the image itself
    padded: Size  # with the padding that it has alone; a batch may be padded further


class Objects(NamedTuple):
    """What there is to be found in one image. Boxes are in pixels of the image as a network is given it."""

    boxes: Tensor  # (n, 4), xyxy
    labels: Tensor  # (n,), from 0 on
    masks: Tensor | None = None  # (n, H, W), 0 or 1, as large as the padded batch


class FoundObjects(NamedTuple):
    """What was found in one image, best first, in the same pixels."""

    boxes: Tensor  # (n, 4), xyxy
    scores: Tensor  # (n,)
    labels: Tensor  # (n,)
    masks: Tensor | None = None  # (n, m, m), probabilities inside each box


class Geometry(ABC):
    """The part of a vision system that has no weights. Processor and model hold equal ones."""

    mean: Statistics
    std: Statistics

    @abstractmethod
    def layout(self, size: Size) -> TokenLayout:
        """size = (H, W) of the upright source image. Raises ValueError where the system cannot take it."""

    def close_up(self, size: Size, region: Region) -> TokenLayout:
        """As `layout`, with a cut around a region of the image in the finest views; the others show all of
        it. Raises ValueError where the system has no others.
        """
        raise ValueError("this vision system has one view, which always shows the whole image: no region")

    def layout_of(self, size: Size, region: Region | None) -> TokenLayout:
        """`layout`, or `close_up` where a region is given."""
        return self.layout(size) if region is None else self.close_up(size, region)

    @abstractmethod
    def inputs(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        """Normalised float tensors (3, h, w), one per entry of `layout.inputs`."""

    def views(self, inputs: Sequence[Tensor], layout: TokenLayout) -> list[Tensor]:
        """What the encoders see of the inputs (3, h, w): one tensor per entry of `layout.views`."""
        return list(inputs)
