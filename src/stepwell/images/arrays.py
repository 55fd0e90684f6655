"""An array or a tensor -> an image: which axis holds the colours, and what its numbers mean.

numpy's arrays, torch's tensors on any device, and what else offers `__array__`. Who has a tensor has imported
torch, so that it need not be imported here.
Letters: H rows, W columns, C channels: 1 (grey), 3 (red, green, blue) or 4 (with transparency).
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from stepwell.images.limits import ImageError
from stepwell.structures import Size

__all__ = ["SupportsArray", "array_size", "from_array"]

_CHANNELS = (1, 3, 4)


@runtime_checkable
class SupportsArray(Protocol):
    """numpy's arrays, torch's tensors, and those of other libraries."""

    def __array__(self) -> Any: ...


def array_size(source: SupportsArray) -> Size:
    """(H, W), by the shape alone. Raises ImageError for shapes that are no image's."""
    shape, axis = _shape(source), _channel_axis(source)
    height, width = (length for i, length in enumerate(shape) if i != axis)
    return height, width


def from_array(source: SupportsArray) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) -> an image of 8 bits, grey, RGB or RGBA.

    Where either axis could be C, it is the last of an array and the first of a tensor. uint8 is taken as it
    is, uint16 over its full range; bool is black and white; floats are 0 to 1, up to what rounds to 8 bits.
    Raises ImageError for other shapes, types and values.
    """
    axis = _channel_axis(source)
    values = _eight_bits(_numpy(source))
    if axis == 0:
        values = values.transpose(1, 2, 0)
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _shape(source: SupportsArray) -> tuple[int, ...]:
    return tuple(map(int, np.shape(source)))


def _channel_axis(source: SupportsArray) -> int | None:
    shape = _shape(source)
    axes = (0, 2) if _is_tensor(source) else (2, 0)
    fitting = [axis for axis in axes if len(shape) == 3 and shape[axis] in _CHANNELS]
    if (len(shape) != 2 and not fitting) or 0 in shape:
        raise ImageError(
            "the array of one image is (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4 and at least one "
            f"pixel, got {shape}"
        )
    return fitting[0] if fitting else None


def _is_tensor(source: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _numpy(source: Any) -> np.ndarray[Any, Any]:
    try:
        if not _is_tensor(source):
            return np.asarray(source)
        values = source.float() if source.is_floating_point() else source  # numpy knows no bfloat16
        return values.numpy(force=True)  # type: ignore[no-any-return]
    except Exception as error:  # each library raises what it likes
        name = type(source).__name__
        raise ImageError(f"this {name} cannot be read as an array ({type(error).__name__})") from None


def _eight_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    kind, size = values.dtype.kind, values.dtype.itemsize
    if (kind, size) == ("u", 1):
        return values
    if (kind, size) == ("u", 2):
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind != "f":
        raise ImageError(
            f"the array of an image is uint8, uint16, bool or of floats from 0 to 1, got {values.dtype}; "
            "convert it to uint8"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        levels = np.multiply(values, 255, dtype=np.float32)
        np.rint(levels, out=levels)
        fits = bool(levels.min() >= 0 and levels.max() <= 255)  # which NaN does not
    if not fits:
        raise ImageError(
            f"an image of floats holds values from 0 to 1, got {values.min():g} to {values.max():g}; undo "
            "their normalisation, or give levels of 0 to 255 as uint8"
        )
    return np.asarray(levels, dtype=np.uint8)
