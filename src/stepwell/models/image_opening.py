"""What every image processor of ours does first: images of any kind are opened, within limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL.Image import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.images.open import open_image

__all__ = ["OpeningImageProcessor", "flat"]

_SAVED_BESIDE = frozenset({"image_processor_type", "processor_class", "backend", "use_fast"})


class OpeningImageProcessor(BaseImageProcessor):
    """Images may be whatever `stepwell.open_image` takes; network addresses are refused, and files are
    decoded within `limits`, which belong to the machine and are not saved. Raises ValueError for unknown
    settings.
    """

    limits: ImageLimits

    def __init__(self, *, limits: ImageLimits | None = None, **kwargs: Any) -> None:
        self.refuse(kwargs.keys() - _SAVED_BESIDE)
        super().__init__(**kwargs)
        self.limits = limits or DEFAULT_LIMITS

    @classmethod
    def refuse(cls, unknown: Iterable[str]) -> None:
        """Raises ValueError naming keywords that nobody reads."""
        if names := sorted(unknown):
            raise ValueError(f"{cls.__name__} knows no {', '.join(map(repr, names))}")

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        output.pop("limits", None)
        return output

    def fetch_images(self, image_url_or_urls: Any, *, limits: ImageLimits | None = None) -> Any:
        """Anything that names or holds an image -> an upright RGB PIL image; lists are kept as they are
        nested. limits: None means the processor's.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item, limits=limits) for item in image_url_or_urls]
        return open_image(image_url_or_urls, limits=limits or self.limits)

    def opened(self, images: Any, limits: ImageLimits | None = None) -> list[Image]:
        """An image, a list of them, or lists of lists, in reading order. Raises ValueError for none."""
        opened = list(flat(self.fetch_images(images, limits=limits)))
        if not opened:
            raise ValueError(f"{type(self).__name__} was given no image; give at least one")
        return opened

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


def flat(images: Any) -> Iterable[Any]:
    """Nested lists of images, one image after the other."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from flat(item)
    else:
        yield images
