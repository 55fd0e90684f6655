"""What is asked, as people give it: images with their regions, and questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from PIL.Image import Image

from stepwell.images.arrays import SupportsArray
from stepwell.images.open import ImageSource
from stepwell.language.characters import well_formed
from stepwell.structures import VisionFeatures
from stepwell.views.region import region_edges

__all__ = ["Asked", "Look", "Question", "Seen", "asked", "check_image", "is_image"]

Seen = ImageSource | VisionFeatures
"""An image, or what `encode` made of it."""
Question = tuple[Seen | Sequence[Seen], str] | tuple[Seen | Sequence[Seen], str, Any]
"""An image, or several, and what is asked about them; and the region of the image, or a list of one for each.
"""


class Look(NamedTuple):
    """An image, and what of it is looked at closely."""

    image: Seen
    region: tuple[float, ...] | None = None  # in pixels of the upright image

    @property
    def key(self) -> Any:
        """Alike for the same image given twice, a path by its name and what is opened by itself, and the same
        region of it.
        """
        image = self.image
        name = str(image) if hasattr(image, "__fspath__") or isinstance(image, str) else id(image)
        return name, self.region


Asked = tuple[Sequence[Look], str]
"""The images of a question, and the question."""


def asked(questions: Iterable[Question]) -> list[Asked]:
    """Raises ValueError naming the first that is no image, or list of images, with a question."""
    form = 'ask_many takes (image or images, question) pairs, such as [("a.jpg", "What?")]'
    if isinstance(questions, str | bytes | dict) or not isinstance(questions, Iterable):
        raise ValueError(f"{form}, got {type(questions).__name__}")
    pairs: list[Asked] = []
    for i, pair in enumerate(questions):
        if not isinstance(pair, list | tuple) or len(pair) not in (2, 3):
            raise ValueError(f"{form}; entry {i} is {_kind_of(pair)}")
        given, question, region = (*pair, None)[:3]
        if not isinstance(question, str):
            raise ValueError(f"a question is a text, got {_kind_of(question)}; {form}")
        is_one = is_image(given) or not isinstance(given, list | tuple)
        images: Sequence[Any] = [given] if is_one else given
        if not question.strip():
            raise ValueError("the question is empty")
        if not images:
            raise ValueError("a question needs at least one image")
        for image in images:
            check_image(image)
        looks = list(map(Look, images, _regions(region, len(images), is_one=is_one)))
        pairs.append((looks, well_formed(question)))
    return pairs


def _regions(given: Any, count: int, *, is_one: bool) -> Sequence[Any]:
    """A region, or None, of each image of a question. Raises ValueError for another number of them."""
    regions = [given] * count if given is None or is_one else given
    if count == 1 and isinstance(regions, list | tuple) and len(regions) != 1:
        regions = [regions]
    if not isinstance(regions, list | tuple) or len(regions) != count:
        raise ValueError(f"of {count} images give a list of as many regions, or None for those without")
    return [None if region is None else region_edges(region) for region in regions]


def is_image(value: Any) -> bool:
    """Of a kind that `open_image` opens, or encoded."""
    kinds = (VisionFeatures, Image, str, PathLike, bytes, bytearray, memoryview, SupportsArray, Mapping)
    return isinstance(value, kinds) or hasattr(value, "read")


def check_image(image: Any) -> None:
    """Raises ValueError for what is no image."""
    if not is_image(image):
        raise ValueError(
            "an image is a path, bytes, a binary file, a data: URL, a PIL image, an array or a tensor, "
            f"or what encode made of one; got {_kind_of(image)}"
        )


def _kind_of(value: Any) -> str:
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, list | tuple) else "")
