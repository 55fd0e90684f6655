"""A path, bytes, a file, a data: URL, an array or a tensor -> an upright RGB image, within limits.

Everything in Stepwell that opens an image comes through here. Pillow decodes; the limits stand around it.
Imports neither torch nor transformers, so that the command line can refuse a bad file at once.
"""

from __future__ import annotations

import base64
import ctypes
import io
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps, _imaging, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from stepwell.images.arrays import SupportsArray, array_size, from_array
from stepwell.images.limits import DEFAULT_LIMITS, NO_LIMITS, ImageError, ImageLimits
from stepwell.images.metadata import bare_heif, bare_png, bare_tiff
from stepwell.structures import Size

__all__ = [
    "ImageSource",
    "image_size",
    "is_ambiguous",
    "open_image",
    "opened",
    "stored_size",
    "upright_rgb",
]

_Bytes = bytes | bytearray | memoryview
_File = str | os.PathLike[str] | _Bytes | IO[bytes]
ImageSource = _File | Image.Image | SupportsArray | Mapping[str, Any]

_READERS: dict[bytes, type[ImageFile]] = {  # Pillow's, by the first bytes of a file
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"\xff\xd8\xff": JpegImageFile,
    rb"RIFF....WEBP": WebPImageFile,
    rb"GIF8[79]a": GifImageFile,
    rb"BM": BmpImageFile,
    rb"II[*+]\0|MM\0[*+]": TiffImageFile,
    rb"....ftyp(?:....){0,15}?avi[fs]": AvifImageFile,
}
_PART = 2**20  # bytes of a file that are read at a time
_HEIC = rb"....ftyp(?:....){0,15}?he[iv][cmsx]"


def open_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB image from a PNG, JPEG, MPO, WEBP, GIF, BMP, TIFF, AVIF or HEIC file, told by content.

    The orientation is applied, transparency is laid over white, 16 bits become 8, and of several frames
    or pages the first is taken. HEIC needs pillow-heif: pip install 'stepwell[heif]'. source: a path, the
    file's bytes, a binary file, a data: URL, a dict of `bytes` or `path` as in undecoded columns of the
    library datasets, a PIL image, or an array or a tensor as in `images.arrays.from_array`. limits: of files,
    bytes and URLs; what is in memory already is not held to them.

    Raises FileNotFoundError for a missing path; ImageError, a ValueError of one line, for everything that is
    not a whole image within the limits; TypeError for a source of another kind.
    """
    with opened(source, limits) as image:
        image.load()
        return upright_rgb(image)


def image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Size:
    """(height, width) of what `open_image` gives, without decoding it: only the header is looked at.

    Raises as `open_image` does, where the header says enough. A file object is read from where it stands.
    """
    if isinstance(source, SupportsArray):
        return array_size(source)
    with opened(source, limits) as image:
        return _upright_size(image)


def stored_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[Size, int]:
    """(height, width) of the pixels as a file stores them, and the Exif orientation, 1 to 8, by which
    `open_image` turns them. Raises as `image_size` does.
    """
    if isinstance(source, SupportsArray):
        return array_size(source), 1
    with opened(source, limits) as image:
        orientation = _orientation(image)
        turns_itself = isinstance(image, TiffImageFile) and orientation >= 5
        return (image.width, image.height) if turns_itself else (image.height, image.width), orientation


def is_ambiguous(stored: Size, orientation: int) -> bool:
    """Whether an image that is turned, as `stored_size` tells, is as large as it is stored."""
    return orientation != 1 and (orientation < 5 or stored[0] == stored[1])


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> a plain RGB one, upright by its Exif orientation, over white if transparent.

    An image that is so already, such as an opened one, is returned as it is; others are copied.
    """
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image
    copy = None
    if _has_short_exif(image):
        with suppress(Exception):  # a damaged Exif block does not spoil an image
            copy = ImageOps.exif_transpose(image)
    rgb = _rgb(copy or image.copy())
    rgb.info = {}  # what told of the turn would turn it once more
    return rgb


def _upright_size(image: Image.Image) -> Size:
    turns = _orientation(image) >= 5 and not isinstance(image, TiffImageFile)  # which turns its size itself
    return (image.width, image.height) if turns else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """By Exif; 1, upright, where nothing that makes sense is said."""
    if _has_short_exif(image):
        with suppress(Exception):
            orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
            return orientation if orientation in range(1, 9) else 1
    return 1


def _has_short_exif(image: Image.Image) -> bool:
    """Of a longer one, Pillow would read every number."""
    return len(image.info.get("exif") or b"") <= 2**17


# Reading: never more than one byte past the limit, and no waiting for what never comes.


def _read(source: ImageSource, limits: ImageLimits) -> bytes:
    """The whole file. Raises ImageError for an empty one, and for one of more bytes than are allowed."""
    raw = _read_at_most(source, limits.max_bytes)
    if not raw:
        raise ImageError("the file is empty")
    if len(raw) > limits.max_bytes:
        raise limits.refusal(
            f"the file is larger than {limits.max_bytes:,} bytes", max_bytes=10 * limits.max_bytes
        )
    return raw


def _read_at_most(source: ImageSource, limit: float) -> bytes:
    if isinstance(source, Mapping):
        source = _in_dict(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_data_url(source)
    if isinstance(source, str) and "://" in source[:16]:
        raise ImageError("images are not fetched from the network; download the file and pass its path")
    if isinstance(source, io.TextIOBase):
        raise TypeError("an image is a binary file, got one of text; open it with open(path, 'rb')")
    try:
        if isinstance(source, _Bytes):
            return bytes(source)
        if isinstance(source, str | os.PathLike):
            mode = os.stat(source).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
                raise ImageError("not a file, but a pipe or a device")
            with open(source, "rb") as file:
                return _read_parts(file, limit)
        if hasattr(source, "read"):
            return _read_parts(cast(IO[bytes], source), limit)
    except (FileNotFoundError, ImageError):
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ImageError(f"the file cannot be read: {reason}") from None
    raise TypeError(
        "an image is a path, bytes, a binary file, a data: URL, a PIL image, an array or a tensor, "
        f"got {type(source).__name__}"
    )


def _in_dict(source: Mapping[str, Any]) -> _File:
    content, path = source.get("bytes"), source.get("path")
    if isinstance(content, _Bytes):  # a text would be taken for a path
        return content
    if content is None and isinstance(path, str | os.PathLike):
        return path
    raise TypeError("a dict is an image where its `bytes` are bytes, or its `path` is the path of a file")


def _read_parts(file: IO[bytes], limit: float) -> bytes:
    """Sockets and pipes give fewer bytes than they are asked for; files set as many aside."""
    parts: list[bytes] = []
    missing = limit + 1
    while missing > 0 and (part := file.read(int(min(missing, _PART)))):
        if not isinstance(part, bytes):
            raise TypeError(f"an image is a binary file, got one that gives {type(part).__name__}")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _from_data_url(url: str) -> bytes:
    head, _, payload = url.partition(",")
    if not head.endswith(";base64"):
        raise ImageError("a data: URL of an image must be base64-encoded")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError:
        raise ImageError("the data: URL is not valid base64") from None


# Decoding


class _TimedFile(io.BytesIO):
    """Pillow reads headers, scans and run lengths in loops that only the end of the file ends."""

    def __init__(self, raw: bytes, limits: ImageLimits) -> None:
        super().__init__(raw)
        self._limits = limits
        self._end = time.thread_time() + limits.max_seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise self._limits.refusal(
                f"decoding takes over {self._limits.max_seconds:g} seconds",
                max_seconds=10 * self._limits.max_seconds,
            )
        return super().read(size)


@contextmanager
def opened(source: ImageSource, limits: ImageLimits) -> Iterator[Image.Image]:
    """An image whose size is known, though its pixels may still be to come: what goes wrong with them in the
    block is an ImageError.
    """
    if not isinstance(limits, ImageLimits):
        raise TypeError(f"limits are stepwell.ImageLimits, got {type(limits).__name__}")
    if isinstance(source, Image.Image):
        with _decoding(source.format or "PIL image"):
            NO_LIMITS.check_size((source.height, source.width))
            yield source
    elif isinstance(source, SupportsArray):
        yield from_array(source)
    else:
        raw = _read(source, limits)
        reader = _reader_of(raw)
        with _decoding(str(reader.format)):
            yield _read_header(raw, reader, limits)


@contextmanager
def _decoding(form: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("there is not enough memory to decode it") from None
    except Exception as error:  # Pillow and the libraries below it raise whatever they like on damaged files
        raise ImageError(f"damaged or unsupported {form} ({type(error).__name__})") from None


def _reader_of(raw: bytes) -> type[ImageFile]:
    reader = next((r for start, r in _READERS.items() if re.match(start, raw, re.DOTALL)), None)
    if reader is AvifImageFile and not features.check("avif"):
        raise ImageError("this Pillow was built without AVIF; pip install pillow gives one that reads it")
    if reader is not None:
        return reader
    if re.match(_HEIC, raw, re.DOTALL) is None:
        raise ImageError("not an image: only PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF and HEIC are read")
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError("HEIC needs pillow-heif: pip install 'stepwell[heif]'") from None
    return HeifImageFile  # type: ignore[no-any-return]


def _read_header(raw: bytes, reader: type[ImageFile], limits: ImageLimits) -> ImageFile:
    tiff_tags: set[int] = set()
    if reader is PngImageFile:
        raw = bare_png(raw)
    elif reader is TiffImageFile:
        raw, tiff_tags = bare_tiff(raw)
        _silence_libtiff()
    elif reader is JpegImageFile and raw.count(b"Exif\0\0") > 32:  # of which Pillow reads every number
        raise ImageError("JPEG of too many Exif blocks")
    elif reader is AvifImageFile and raw.count(b"infe") > 64:  # each decoded, however large it really is
        raise ImageError("AVIF of too many tiles")
    elif raw[4:8] == b"ftyp":
        raw = bare_heif(raw)
    image = reader(_TimedFile(raw, limits))  # reads the header only
    limits.check_size((image.height, image.width))
    if isinstance(image, TiffImageFile):
        _check_cells(image, tiff_tags, len(raw), limits)
    elif isinstance(image, PngImageFile):
        _scale_transparent(image)
    image.decodermaxblock = 4096  # so that few scans of a progressive JPEG pass between two looks at the time
    return image


def _check_cells(image: TiffImageFile, tags: set[int], size: int, limits: ImageLimits) -> None:
    """Of strips or tiles, libtiff decodes each whole, though they reach past the image or into each other."""
    values = (
        image.tag_v2
    )  # 256, 257 size; 259 compression; 279, 325 bytes of strips and tiles; 322, 323 tiles
    width, height, across, down = values[256], values[257], values.get(322, 1), values.get(323, 1)
    cells = -(-width // across) * across * -(-height // down) * down
    if cells > 2 * limits.max_pixels:
        raise limits.refusal(
            f"TIFF with tiles of {across} x {down} for {width} x {height} pixels", max_pixels=-(-cells // 2)
        )
    lengths = sum(values.get(279, ())) + sum(values.get(325, ()))
    if values.get(259, 1) != 1 and (lengths > size or tags != values.keys()):
        raise ImageError("damaged TIFF: its strips or tiles are not all in the file")


def _scale_transparent(image: PngImageFile) -> None:
    """The transparent colour of a PNG in the 8 bits that Pillow compares it with (16 for grey of 16 bits)."""
    colour, packing = image.info.get("transparency"), image.tile[0].args
    if packing == "RGB;16B" and colour is not None:
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif packing in ("L;2", "L;4") and colour is not None:
        image.info["transparency"] = colour * (85 if packing == "L;2" else 17)


@cache
def _silence_libtiff() -> None:
    """Pillow switches off libtiff's warnings but leaves its errors, which it prints to standard error."""
    with suppress(OSError, AttributeError):  # where libtiff is linked in such a way that it cannot be found
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


# Colours


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey over its full range; wider numbers over the first usual range that holds them all."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32)).astype(np.float64)
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        least, most = float(values.min()), float(values.max())
        fitting = [(0.0, top) for top in (1.0, 255.0, 65535.0) if least >= 0 and most <= top]
        low, high = (*fitting, (least, max(most, least + 1)))[0]
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = high  # white
    values -= low  # in place: 36 million of them take 288 MB
    values *= 255 / (high - low)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))
