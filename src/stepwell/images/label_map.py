"""An image file that holds numbers and not a picture: the class of every pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from stepwell.images.limits import DEFAULT_LIMITS, ImageError, ImageLimits
from stepwell.images.open import ImageSource, opened

__all__ = ["open_label_map", "turned"]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Exif orientations -> how Pillow says them."""
_SPREAD = {"L;2": 85, "L;4": 17}
"""Grey of 2 and 4 bits, which Pillow spreads over 8."""


def open_label_map(
    source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The numbers of an image of one channel or of a palette (H, W), or the colours (H, W, 3) of another, as
    they are stored: not turned.

    Raises as `open_image` does, and ImageError for one that is partly transparent, and for fractions.
    """
    with opened(source, limits) as image:
        tile = getattr(image, "tile", None)
        spread = _SPREAD.get(tile[0].args if tile and isinstance(tile[0].args, str) else "", 1)
        image.load()
        if image.mode in ("P", "L", "I", "F") or image.mode.startswith("I;16"):
            stored = np.asarray(image)
            if not np.array_equal(stored, stored.astype(np.int64)):
                raise ImageError("a map of labels holds whole numbers, and this one fractions")
            return stored.astype(np.int64) // spread
        if image.mode == "1":
            return np.asarray(image.convert("L")).astype(np.int64) // 255
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise ImageError("a map of labels with transparent pixels")
        return np.asarray(image.convert("RGB")).astype(np.int64)


def turned(
    numbers: np.ndarray[Any, np.dtype[np.int64]], orientation: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers (H, W) as stored -> as an image of this Exif orientation is shown."""
    if orientation not in _TURNS:
        return numbers
    return np.asarray(Image.fromarray(numbers.astype(np.int32)).transpose(_TURNS[orientation])).astype(
        np.int64
    )
