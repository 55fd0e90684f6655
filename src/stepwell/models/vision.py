"""What every vision system is: a geometry, encoders and a projector; and the settings that build one.

The path: `geometry.layout(size)` says what an image will cost, `geometry.inputs(image, layout)` are its
tensors, and `encode(inputs, layouts)` turns the inputs of many images, of any sizes, into visual tokens and
feature maps. Letters: N visual tokens of an image, D the language model's width, (h, w) the size of an input.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from stepwell.encoders.encoder import Encoder
from stepwell.structures import Geometry, Statistics, TokenLayout, VisionFeatures

__all__ = [
    "NEVER_CUT",
    "STRICT",
    "Deviations",
    "VisionConfig",
    "VisionSystem",
    "first_complaint",
    "fitted",
    "settings_json",
    "validated",
]

NEVER_CUT = [
    *("BranchHeads", "BranchMerge", "ConvNeXt", "DualEnhancement", "Interaction", "ResNet"),
    *("TokenMerge", "VisionTransformer", "TimmBlocks", "TimmNetwork", "TimmStages", "InversePyramid"),
    *("WindowAttention", "MixtureAdapter", "MixtureMerge", "Cascade", "Dino", "Rcnn", "UperNet"),
]
"""Classes, for `_no_split_modules`, whose parts have to be on one device: they add what two of them give, or
hold parameters beside them. What goes from one of these to another may go to another device.
"""


class VisionSystem(nn.Module, ABC):
    """A subclass sets `geometry` and `projector`, and says what its encoders are and how it encodes."""

    geometry: Geometry
    projector: nn.Module  # visual width -> D

    @property
    @abstractmethod
    def encoders(self) -> Sequence[Encoder]:
        """The pretrained networks, in the order of their branches."""

    @abstractmethod
    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        """inputs: (3, h, w) of all images in order, as many as the layouts say -> the features of each image.

        What is alike in shape goes through a network together (ops/ragged.py), whichever image it belongs to.
        """

    def forward(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """inputs as for `encode` -> visual tokens (N, D) of each image."""
        return [features.tokens for features in self.encode(inputs, layouts)]


class VisionConfig(ABC):
    """The settings of a vision system: a frozen pydantic dataclass in the system's own file."""

    kind: str
    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Fields that may change after training, beside the views' sizes: no weight depends on them."""
    parts: ClassVar[Mapping[str, str]]
    """Names of parts, as recipes write them -> the system's submodule. All begin with "vision" or
    "projector".
    """

    @abstractmethod
    def geometry(self) -> Geometry:
        """The weightless part, for a processor."""

    @abstractmethod
    def build(self, out_dim: int) -> VisionSystem:
        """The system with random weights; its tokens are `out_dim` wide."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """Long side in pixels of the largest input."""

    @abstractmethod
    def resized(self, sizes: Sequence[int]) -> Self:
        """The same system with views of other sides. Raises ValueError for another number of them."""

    def sizes_for(self, largest: int) -> list[int]:
        """Sides of the views, as `resized` takes them, where the largest input has this long side."""
        return [largest]

    def as_papers_count(self) -> VisionConfig:
        """The system whose FLOPs the papers print for this one."""
        return self

    def adjusted(self, changes: Mapping[str, Any]) -> Self:
        """The same weights on another geometry: fields of `adjustable`, and `sizes` of the views.

        Raises ValueError for any other field, and for values that the settings refuse.
        """
        fields = {name: value for name, value in changes.items() if name != "sizes"}
        if fixed := sorted(fields.keys() - self.adjustable):
            raise ValueError(
                f"vision.{fixed[0]} of a {self.kind!r} system cannot change: weights depend on it, or it is "
                f"no field; adjustable are {', '.join(['sizes', *sorted(self.adjustable)])}"
            )
        try:
            settings = dataclasses.replace(cast(Any, self), **fields)
        except ValidationError as error:
            raise ValueError(f"vision: {first_complaint(error)}") from None
        return cast(Self, settings if "sizes" not in changes else settings.resized(changes["sizes"]))


def fitted(pixels: Tensor, network: nn.Module) -> Tensor:
    """Pixels in the precision of a network's parameters. Raises ValueError where those are on another device,
    unless accelerate or DeepSpeed has put them there for a while.
    """
    weight = next(p for p in network.parameters() if p.is_floating_point())  # others are quantised
    is_offloaded = hasattr(weight, "ds_id") or any(hasattr(m, "_hf_hook") for m in network.modules())
    if pixels.device != weight.device and not is_offloaded:
        raise ValueError(
            f"pixel_values are on {pixels.device}, the model is on {weight.device}; "
            "hand over inputs.to(model.device)"
        )
    return pixels.to(weight.dtype)


STRICT = ConfigDict(extra="forbid")
"""Of every settings dataclass: a misspelt key is an error."""


def _positive(std: Statistics) -> Statistics:
    if not all(value > 0 for value in std):
        raise ValueError(f"pixels are divided by std, which is above 0 in each colour, got {list(std)}")
    return std


Deviations = Annotated[Statistics, AfterValidator(_positive)]
"""Of red, green and blue, as settings take them."""


def validated(kind: Any, settings: Any, name: str) -> Any:
    """Settings or their JSON -> an instance of `kind`. Raises ValueError of one line: `name` and the wrong
    field.
    """
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise ValueError(f"{name}: {first_complaint(error)}") from None


def settings_json(settings: Any) -> dict[str, Any]:
    """Settings as plain JSON, every field written out."""
    return cast(dict[str, Any], TypeAdapter(type(settings)).dump_python(settings, mode="json"))


def first_complaint(error: ValidationError) -> str:
    """The first thing pydantic refused, as one line with the field's dotted name."""
    complaint = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in complaint["loc"])
    message = complaint["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
