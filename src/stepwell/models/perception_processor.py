"""Images -> batches for detectors and segmenters; logits -> a class for every pixel.

Sizes, pixels and padding are those of views/resize.py. Letters: B batch, K classes, (H, W) the largest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BatchFeature

from stepwell.heads.sliding import class_map
from stepwell.images.limits import ImageLimits
from stepwell.models.config import LOADING
from stepwell.models.image_opening import OpeningImageProcessor
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, Size
from stepwell.views.resize import pad_batch, prepare_image, size_of_short_side

__all__ = ["PaddedImageProcessor", "StepwellSegmentationImageProcessor", "checked_side", "target_pairs"]


class PaddedImageProcessor(OpeningImageProcessor):
    """Images of unequal sizes -> `pixel_values` (B, 3, H, W), zeros at the right and the bottom after the
    normalisation, and `pixel_mask` (B, H, W), int64: 1 where an image is.

    image_mean, image_std: of pixels in 0..1, red, green, blue. size_divisor: sides are padded to its
    multiples. Settings are saved; `limits` of image files are not.
    """

    model_input_names = ["pixel_values", "pixel_mask"]
    settings: ClassVar[tuple[str, ...]] = ("size_divisor", "image_mean", "image_std")
    """Names of the settings that a folder keeps, and that `from_pretrained` takes others for."""

    def __init__(
        self,
        *,
        size_divisor: int = 1,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(limits=limits, **kwargs)
        self.size_divisor = checked_side(size_divisor, "size_divisor")
        self.image_mean = _statistics(image_mean, "image_mean", at_least=0)
        self.image_std = _statistics(image_std, "image_std", at_least=1e-6)

    @classmethod
    def from_pretrained(cls, source: Any, *, limits: ImageLimits | None = None, **kwargs: Any) -> Any:
        """As transformers'; settings that are named replace those of the folder. Raises ValueError for
        keywords that are not known (those of a pipeline are the model's too).
        """
        changes = {name: kwargs.pop(name) for name in cls.settings if name in kwargs}
        if "_from_pipeline" not in kwargs:
            cls.refuse(kwargs.keys() - LOADING)
        found = super().from_pretrained(source, **kwargs)
        settings = {name: getattr(found, name) for name in cls.settings}
        return cls(**{**settings, **changes}, limits=limits)

    @property
    def tile_side(self) -> int:
        """Of a tile of a big picture, where nobody says how large tiles are."""
        raise NotImplementedError

    def prepared_size(self, size: Size) -> Size:
        """(H, W) of an image -> of its pixels in a batch, before it is padded."""
        return size

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """An image, a list of them, or lists of lists -> BatchFeature, in reading order.

        limits: of image files, by default the processor's. Raises ValueError for no image at all.
        """
        self.refuse(kwargs)
        opened = self.opened(images, limits)
        sizes = [self.prepared_size((image.height, image.width)) for image in opened]
        return self.batch_of(opened, sizes, return_tensors)

    def batch_of(
        self, images: Sequence[Image], sizes: Sequence[Size], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """RGB images, and the size that each is resized to -> what `preprocess` gives."""
        prepared = [
            prepare_image(image, size, self.image_mean, self.image_std)
            for image, size in zip(images, sizes, strict=True)
        ]
        batch, extents = pad_batch(prepared, self.size_divisor)
        mask = torch.zeros(len(batch), *batch.shape[-2:], dtype=torch.int64)
        for place, extent in zip(mask, extents, strict=True):
            place[: extent.valid[0], : extent.valid[1]] = 1
        return BatchFeature({"pixel_values": batch, "pixel_mask": mask}, tensor_type=return_tensors)


class StepwellSegmentationImageProcessor(PaddedImageProcessor):
    """Of PIIP's segmenters (arXiv 2501.07783, by MMSegmentation): the short side is resized to
    `short_side`, and the long one has no limit. Images of one batch are padded to the largest alone.
    """

    settings = ("short_side", *PaddedImageProcessor.settings)

    def __init__(self, *, short_side: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.short_side = checked_side(short_side, "short_side")

    @property
    def tile_side(self) -> int:
        return self.short_side

    def prepared_size(self, size: Size) -> Size:
        return size_of_short_side(size, self.short_side)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Tensor | Sequence[Size] | None = None
    ) -> list[Tensor]:
        """outputs: `logits` (B, K, H, W) and, for images of unequal sizes, `image_sizes` (B, 2), height and
        width without padding. target_sizes: (H, W) of every original image; None leaves the size of the
        prepared ones.

        The class (H, W) of every pixel, int64: logits are resized to the original size before the largest is
        taken. Raises ValueError for another number of sizes than images.
        """
        logits, valid = outputs.logits, getattr(outputs, "image_sizes", None)
        sizes = target_pairs(target_sizes, len(logits))
        maps = []
        for i, (values, size) in enumerate(zip(logits, sizes, strict=True)):
            if valid is not None:
                height, width = valid[i].tolist()
                values = values[:, :height, :width]
            maps.append(class_map(values[None], size or values.shape[-2:])[0])
        return maps


def target_pairs(target_sizes: Tensor | Sequence[Size] | None, count: int) -> list[Size | None]:
    """(H, W) of every image of a batch. Raises ValueError for another number of them."""
    if target_sizes is None:
        return [None] * count
    if len(target_sizes) != count:
        raise ValueError(f"target_sizes has {len(target_sizes)} sizes for {count} images; give one an image")
    return [(int(height), int(width)) for height, width in target_sizes]


def checked_side(value: int, name: str) -> int:
    """Raises ValueError unless it is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
    return value


def _statistics(values: Sequence[float], name: str, at_least: float) -> list[float]:
    """As a list of numbers, as it is saved."""
    numbers = [float(value) for value in values]
    if len(numbers) != 3 or not all(at_least <= value <= 1 for value in numbers):
        raise ValueError(
            f"{name} is of red, green and blue in 0..1, got {numbers}; divide those for 0..255 by 255"
        )
    return numbers
