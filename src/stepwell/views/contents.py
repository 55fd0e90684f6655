"""What reading a picture file's outside comes to: its contents, or a refusal. Sizes are (height, width)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from PIL.ImageFile import ImageFile

from stepwell.structures import Size

__all__ = ["Contents", "ImageError"]


class ImageError(ValueError):
    """A picture that cannot or may not be read. One line, which never repeats the picture's bytes."""


class Contents(NamedTuple):
    """A picture file, reduced to the first picture in it."""

    format: str
    reader: Callable[..., ImageFile]  # Pillow's class for the format
    data: bytes  # a file with the pixels and nothing else
    size: Size  # as stored, before the orientation is applied
    orientation: int  # Exif, 1 to 8
    work: int  # an estimate of the time to decode it, in nanoseconds
