"""Images -> what a vision system is handed: the pixels of all inputs, packed, and the sizes of the images.

Letters: P pixels of all inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.images.open import open_image
from stepwell.models.config import LOADING, refuse_other_settings
from stepwell.models.plain import PlainConfig
from stepwell.models.systems import vision_settings
from stepwell.models.vision import VisionConfig, settings_json
from stepwell.ops.pack import pack
from stepwell.structures import Geometry, TokenLayout

__all__ = ["StepwellImageProcessor", "flat"]

_SAVED_BESIDE = frozenset({"image_processor_type", "processor_class", "backend", "use_fast"})


class StepwellImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` (P, 3), a row a pixel, input after input, and `image_sizes` (images, 2).

    vision_config: settings of a vision system or their JSON. Images may be whatever `stepwell.open_image`
    takes; network addresses are refused, and files are decoded within `limits`, which belong to the machine
    and are not saved. Batches made apart join by `cat`.
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        vision_config: VisionConfig | dict[str, Any] | None = None,
        *,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := sorted(kwargs.keys() - _SAVED_BESIDE):
            raise ValueError(f"StepwellImageProcessor knows no {', '.join(map(repr, unknown))}")
        super().__init__(**kwargs)
        self.vision_config = settings_json(vision_settings(vision_config or PlainConfig()))
        self.limits = limits or DEFAULT_LIMITS

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        vision: dict[str, Any] | None = None,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', with the vision settings of the model beside it, which owns them.

        vision: changes to the geometry, such as {"framing": "crop"}. limits: of image files. Raises
        ValueError naming the first setting in which the model's config.json and this processor differ, and
        for keywords that are not known (those of a pipeline are the model's too).
        """
        if "_from_pipeline" not in kwargs and (unknown := sorted(kwargs.keys() - LOADING)):
            raise ValueError(f"StepwellImageProcessor knows no {', '.join(map(repr, unknown))}")
        processor = super().from_pretrained(source, **kwargs)
        refuse_other_settings(source, kwargs, vision_config=processor.vision_config)
        processor.limits = limits or processor.limits
        return processor.adjusted(vision) if vision else processor

    def adjusted(self, vision: Mapping[str, Any]) -> StepwellImageProcessor:
        """The processor of the same system on another geometry (`VisionConfig.adjusted`)."""
        settings = vision_settings(self.vision_config).adjusted(vision)
        return StepwellImageProcessor(settings, limits=self.limits)

    @cached_property
    def geometry(self) -> Geometry:
        return vision_settings(self.vision_config).geometry()

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        for name in ("geometry", "limits"):
            output.pop(name, None)
        return output

    def fetch_images(self, image_url_or_urls: Any, *, limits: ImageLimits | None = None) -> Any:
        """Anything that names or holds an image -> an upright RGB PIL image; lists are kept as they are
        nested. limits: None means the processor's.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item, limits=limits) for item in image_url_or_urls]
        return open_image(image_url_or_urls, limits=limits or self.limits)

    def layouts(self, images: Sequence[Image]) -> list[TokenLayout]:
        """Of opened images: pure integers, before any pixel is read."""
        return [self.geometry.layout((image.height, image.width)) for image in images]

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        layouts: Sequence[TokenLayout] | None = None,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """An image, a list of them, or lists of lists -> BatchFeature, in reading order.

        layouts: one an image, where they are known already. limits: of image files, by default the
        processor's. Raises ValueError for no image at all.
        """
        if kwargs:
            raise ValueError(f"StepwellImageProcessor knows no {', '.join(map(repr, sorted(kwargs)))}")
        images = list(flat(self.fetch_images(images, limits=limits)))
        if not images:
            raise ValueError("StepwellImageProcessor was given no image; give at least one")
        layouts = self.layouts(images) if layouts is None else layouts
        inputs = [
            tensor
            for image, layout in zip(images, layouts, strict=True)
            for tensor in self.geometry.inputs(image, layout)
        ]
        sizes = torch.tensor([layout.image_size for layout in layouts])
        return BatchFeature({"pixel_values": pack(inputs), "image_sizes": sizes}, tensor_type=return_tensors)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


def flat(images: Any) -> Iterable[Any]:
    """Nested lists of images, one image after the other."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from flat(item)
    else:
        yield images
