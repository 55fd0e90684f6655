"""A path, bytes or a file -> an upright RGB picture, within limits on bytes, pixels, time and memory.

Everything in Stepwell that opens a picture comes through here. Imports neither torch nor transformers, so
that the command line can refuse a bad file at once. Sizes are (height, width); pictures are PIL images.
"""

from __future__ import annotations

import ctypes
import io
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, _imaging

from stepwell.views.containers import unpack
from stepwell.views.contents import Contents, ImageError
from stepwell.views.tiff import exif_orientation

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ImageError", "ImageLimits", "open_image", "upright_rgb"]

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]

WAIT_SECONDS = 2.0  # for a named pipe or a terminal that sends nothing
BAND_PIXELS = 2**21


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What `open_image` accepts. The defaults keep it to 3 seconds and 1 GiB, whatever the file holds."""

    max_bytes: int = 32_000_000  # of the file
    max_pixels: int = 36_000_000
    max_side: int = 16_384  # pixels
    max_aspect: float = 200.0  # long side over short side
    max_seconds: float = 1.75  # of decoding, as estimated before it starts: progressive JPEG, run lengths

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_pixels, self.max_side, self.max_aspect) < 1 or self.max_seconds <= 0:
            raise ValueError(f"image limits must be at least 1, and the seconds above 0, got {self}")


def open_image(source: Source, *, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """A picture as an upright RGB image: PNG, JPEG, MPO, WEBP, GIF, BMP or TIFF, told apart by content.

    The Exif orientation is applied, transparency is laid over white, 16 bits become 8, and of an animation or
    a file of several pages the first is taken. `source` is a path, the file's bytes or a binary file.

    Raises FileNotFoundError for a missing path; ImageError, a ValueError of one line, for everything that is
    not a whole picture within the limits; TypeError for a source of another kind.
    """
    raw = _read(source, limits.max_bytes)
    kind = "picture"
    try:
        contents = unpack(raw)
        kind = contents.format
        _check(contents, limits)
        return _decode(contents)
    except ImageError:
        raise
    except Exception as error:  # Pillow and the libraries below it raise whatever they like on damaged files
        raise ImageError(f"damaged or unsupported {kind} ({type(error).__name__})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> a new plain RGB one, upright by its Exif orientation, over white if transparent."""
    exif = image.info.get("exif", b"")
    return _upright(image.copy(), exif_orientation(exif) if isinstance(exif, bytes) else 1)


# Reading: never more than one byte past the limit, and no waiting for what never comes.


def _read(source: Source, limit: int) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        raw = bytes(source)
    elif isinstance(source, str | os.PathLike):
        raw = _read_path(source, limit)
    elif hasattr(source, "read"):
        try:
            raw = _read_all(source.read, limit)
        except (OSError, ValueError) as error:
            raise ImageError(f"the file cannot be read ({type(error).__name__})") from None
    else:
        raise TypeError(f"open_image takes a path, bytes or a binary file, got {type(source).__name__}")
    if len(raw) > limit:
        raise ImageError(f"the file is larger than {limit:,} bytes; ImageLimits(max_bytes=...) allows more")
    return raw


def _read_path(path: str | os.PathLike[str], limit: int) -> bytes:
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return _read_all(file.read, limit)
            return _read_all(lambda count: _read_ready(file, count), limit)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, os.fspath(path)[:200]) from None
    except OSError as error:
        raise ImageError(f"the file cannot be read: {os.strerror(error.errno or 0)}") from None
    except ImageError:
        raise
    except ValueError:
        raise ImageError("not a path: it holds a zero character") from None


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody at the other end of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_ready(file: io.RawIOBase, count: int) -> bytes | None:
    if not select.select([file], [], [], WAIT_SECONDS)[0]:
        raise ImageError(f"the file cannot be read: nothing came for {WAIT_SECONDS:g} seconds")
    return file.read(count)


def _read_all(read: Callable[[int], bytes | None], limit: int) -> bytes:
    parts: list[bytes] = []
    missing = limit + 1
    while missing > 0 and (part := read(min(missing, 2**20))):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# Decoding


def _check(contents: Contents, limits: ImageLimits) -> None:
    height, width = contents.size
    if height < 1 or width < 1:
        raise ImageError(f"damaged {contents.format}: an empty picture")
    shown = f"a picture of {width} x {height} pixels is"
    if height * width > limits.max_pixels:
        raise ImageError(f"{shown} more than {limits.max_pixels:,}; ImageLimits(max_pixels=...) allows more")
    if max(height, width) > limits.max_side:
        raise ImageError(f"{shown} longer than {limits.max_side:,}; ImageLimits(max_side=...) allows more")
    if max(height, width) > limits.max_aspect * min(height, width):
        raise ImageError(
            f"{shown} narrower than 1:{limits.max_aspect:g}; ImageLimits(max_aspect=...) allows more"
        )
    if contents.work > limits.max_seconds * 1e9:
        raise ImageError(
            f"a {contents.format} coded in this way takes over {limits.max_seconds:g} seconds to decode; "
            "ImageLimits(max_seconds=...) allows more"
        )


def _decode(contents: Contents) -> Image.Image:
    if contents.format == "TIFF":
        _silence_libtiff()
    with contents.reader(io.BytesIO(contents.data)) as image:
        if image.size != contents.size[::-1]:
            raise ImageError(f"damaged {contents.format}: its size is told in two ways")
        image.load()
        plain = image._new(image.im)  # the same pixels without the reader, which may hold as many again
    del image
    return _upright(plain, contents.orientation)


@cache
def _silence_libtiff() -> None:
    """Pillow switches off libtiff's warnings but leaves its errors, which it prints to standard error."""
    with suppress(OSError, AttributeError):  # where libtiff is linked in such a way that it cannot be found
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


# Look


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """RGB, upright, without the metadata that would turn it once more. The image given may be changed."""
    image = _rgb(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    image.info = {}
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """The same image if it is RGB already."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "LAB":
        image = _from_lab(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey over its full range; wider numbers over the first usual range that holds them all."""
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        least = min(float(values.min()) for _, values in _bands(image))
        most = max(float(values.max()) for _, values in _bands(image))
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        fitting = [(0.0, top) for top in ranges if least >= 0 and most <= top]
        low, high = (*fitting, (least, max(most, least + 1)))[0]
    grey = Image.new("L", image.size)
    for top, values in _bands(image):
        band = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
        if "transparency" in image.info:
            band[values == image.info["transparency"]] = 255
        grey.paste(Image.fromarray(band), (0, top))
    return grey


def _bands(image: Image.Image) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The values of a few rows at a time, with the first row's number: wide numbers take much memory."""
    rows = max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.nan_to_num(np.asarray(band, dtype=np.float32)).astype(np.float64)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
