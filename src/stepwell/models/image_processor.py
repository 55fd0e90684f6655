"""Images -> what a vision system is handed: the pixels of all inputs, packed, and the sizes of the images.

Letters: P pixels of all inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from transformers import BatchFeature

from stepwell.images.limits import ImageLimits
from stepwell.models.config import LOADING, refuse_other_settings
from stepwell.models.image_opening import OpeningImageProcessor
from stepwell.models.plain import PlainConfig
from stepwell.models.systems import vision_settings
from stepwell.models.vision import VisionConfig, settings_json
from stepwell.ops.pack import pack
from stepwell.structures import NO_REGION, Geometry, TokenLayout
from stepwell.views.region import region_in_pixels

__all__ = ["StepwellImageProcessor"]


class StepwellImageProcessor(OpeningImageProcessor):
    """Images -> `pixel_values` (P, 3), a row a pixel, input after input, and `image_sizes` (images, 2); where
    a region is given, also `image_regions` (images, 4), in pixels, of zeros for an image that has none.

    vision_config: settings of a vision system or their JSON. Batches made apart join by `cat`.
    """

    model_input_names = ["pixel_values", "image_sizes", "image_regions"]

    def __init__(
        self,
        vision_config: VisionConfig | dict[str, Any] | None = None,
        *,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(limits=limits, **kwargs)
        self.vision_config = settings_json(vision_settings(vision_config or PlainConfig()))

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
        if "_from_pipeline" not in kwargs:
            cls.refuse(kwargs.keys() - LOADING)
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
        output = super().to_dict()
        output.pop("geometry", None)
        return output

    def layouts(
        self, images: Sequence[Image], regions: Sequence[Sequence[float] | None] | None = None
    ) -> list[TokenLayout]:
        """Of opened images: pure integers, before any pixel is read. regions: that are looked at closely, one
        an image or None, (left, top, right, bottom) in its pixels.

        Raises ValueError for what is no region of its image, and where the system shows no parts of images.
        """
        regions = [None] * len(images) if regions is None else regions
        if len(regions) != len(images):
            raise ValueError(f"{len(regions)} regions were given for {len(images)} images; None is none")
        sizes = [(image.height, image.width) for image in images]
        return [
            self.geometry.layout_of(size, None if region is None else region_in_pixels(region, size))
            for size, region in zip(sizes, regions, strict=True)
        ]

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        regions: Sequence[Sequence[float] | None] | None = None,
        layouts: Sequence[TokenLayout] | None = None,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """An image, a list of them, or lists of lists -> BatchFeature, in reading order.

        regions: as of `layouts`. layouts: one an image, where they are known already. limits: of image files,
        by default the processor's. Raises ValueError for no image at all, and as `layouts` does.
        """
        self.refuse(kwargs)
        images = self.opened(images, limits)
        layouts = self.layouts(images, regions) if layouts is None else layouts
        inputs = [
            tensor
            for image, layout in zip(images, layouts, strict=True)
            for tensor in self.geometry.inputs(image, layout)
        ]
        data = {
            "pixel_values": pack(inputs),
            "image_sizes": torch.tensor([layout.image_size for layout in layouts]),
        }
        if any(layout.region for layout in layouts):
            data["image_regions"] = torch.tensor([layout.region or NO_REGION for layout in layouts])
        return BatchFeature(data, tensor_type=return_tensors)
