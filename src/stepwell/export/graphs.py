"""What of a model becomes a graph, for images of one size.

Of detectors, segmenters and classifiers it is `Predicts.score`; of a backbone its maps; of an assistant its
vision system: visual tokens and maps of an image. Letters: B images, (H, W) what the network is given, (h, w)
the same without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as Images
from PIL.Image import Image
from torch import Tensor, nn

from stepwell.models.ask import Assistant
from stepwell.models.detector import StepwellForObjectDetection
from stepwell.models.perception import PyramidBackbone, PyramidForImageClassification
from stepwell.models.segmenter import StepwellForSemanticSegmentation
from stepwell.models.vision import VisionSystem
from stepwell.models.with_head import in_whole_cells, padded, valid_sizes
from stepwell.structures import Size, TokenLayout

__all__ = ["Exported", "default_size", "exported"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A module that takes tensors of known sizes, and how a picture becomes these."""

    kind: str
    module: nn.Module
    sizes: tuple[Size, ...]  # (H, W) of each input
    image: Size | None  # (h, w), where the graph depends on it
    outputs: tuple[str, ...]
    any_batch: bool
    maps: tuple[tuple[int, float], ...] = ()  # of an assistant's maps, number of the view and stride
    prepare: Callable[
        [Image], list[Tensor]
    ]  # a picture of that size -> the inputs, (1, 3, H, W) or (3, H, W)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("pixels",) if len(self.sizes) == 1 else tuple(f"pixels_{i}" for i in range(len(self.sizes)))


_KINDS = (
    PyramidBackbone,
    PyramidForImageClassification,
    StepwellForSemanticSegmentation,
    StepwellForObjectDetection,
)


class _Scored(nn.Module):
    """The image without padding is as large as `size`. One size is told of any number of images: where it
    matters they come one at a time.
    """

    def __init__(self, model: Any, size: Size) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.model.score(pixels, [self.size])
        return found


class _Maps(nn.Module):
    def __init__(self, backbone: PyramidBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = self.backbone(pixels).feature_maps
        return maps


class _Encoded(nn.Module):
    """Visual tokens, then all maps, of one image of a layout."""

    def __init__(self, system: VisionSystem, layout: TokenLayout) -> None:
        super().__init__()
        self.system, self.layout = system, layout

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (features,) = self.system.encode(list(inputs), [self.layout])
        return features.tokens, *(found.map for found in features.maps)


def exported(model: Any, size: Size) -> Exported:
    """The graph of a model for pictures of `size`, height first. Raises ValueError for a model that has
    none, and for a picture that it does not take.
    """
    if isinstance(model, Assistant):
        return _of_assistant(model, size)
    if not isinstance(model, _KINDS):
        raise ValueError(f"a {type(model).__name__} has no graph to export")
    inputs = model.image_processor()([Images.new("RGB", (size[1], size[0]))], return_tensors="pt")
    pixels = inputs["pixel_values"]
    if isinstance(model, PyramidBackbone):
        return _graph("backbone", model, _Maps(model), pixels, lambda given: in_whole_cells(given, model))
    if isinstance(model, PyramidForImageClassification):
        return _graph("classifier", model, _Scored(model, _size(pixels)), pixels, lambda given: given)
    if isinstance(model, StepwellForSemanticSegmentation):
        window = model.config.image_settings.window
        height, width = shown = (window, window) if window else _size(pixels)

        def of_segmenter(given: Tensor) -> Tensor:
            return padded(given[..., :height, :width], model.divisor, model.smallest)

        return _graph("segmenter", model, _Scored(model, shown), pixels, of_segmenter)
    divisor = model.config.image_settings.size_divisor
    (valid,) = valid_sizes(pixels, inputs["pixel_mask"])
    depends = model.config.head["kind"] == "dino"

    def of_detector(given: Tensor) -> Tensor:
        return padded(given, divisor, model.smallest)

    return _graph("detector", model, _Scored(model, valid), pixels, of_detector, valid if depends else None)


def default_size(model: Any) -> Size:
    """Of the square picture that a model is made for, or that its tiles are."""
    if isinstance(model, Assistant):
        side = model.model.config.vision.largest
    elif isinstance(model, PyramidBackbone | PyramidForImageClassification):
        side = model.config.settings.image_side
    else:
        side = model.image_processor().tile_side
    return side, side


def _graph(
    kind: str,
    model: Any,
    module: nn.Module,
    pixels: Tensor,
    fit: Callable[[Tensor], Tensor],
    image: Size | None = None,
) -> Exported:
    """pixels: of a picture of the graph's size, as the model's image processor gives them; fit: those -> what
    the module takes.
    """
    given = fit(pixels)
    with torch.no_grad():
        outputs = module.eval()(given)
    names = tuple(f"output_{i}" for i in range(len(outputs)))
    return Exported(
        kind=kind,
        module=module,
        sizes=(_size(given),),
        image=image,
        outputs={"classifier": ("logits",), "segmenter": ("logits",)}.get(kind, names),
        any_batch=image is None,
        prepare=lambda picture: [fit(_normalised(model, picture))],
    )


def _of_assistant(assistant: Assistant, size: Size) -> Exported:
    engine: Any = assistant.engine
    geometry = engine.geometry
    layout = geometry.layout(size)
    module = _Encoded(engine.model.model.vision, layout).eval()
    inputs = [torch.zeros(3, *given) for given in layout.inputs]
    with torch.no_grad():
        (features,) = module.system.encode(inputs, [layout])
    return Exported(
        kind="vision",
        module=module,
        sizes=layout.inputs,
        image=size,
        outputs=("tokens", *(f"map_{i}" for i in range(len(features.maps)))),
        maps=tuple((layout.views.index(found.view), found.stride) for found in features.maps),
        any_batch=False,
        prepare=lambda picture: list(geometry.inputs(picture, layout)),
    )


def _normalised(model: Any, picture: Image) -> Tensor:
    pixels: Tensor = model.image_processor()([picture], return_tensors="pt")["pixel_values"]
    return pixels


def _size(pixels: Tensor) -> Size:
    return pixels.shape[-2], pixels.shape[-1]
