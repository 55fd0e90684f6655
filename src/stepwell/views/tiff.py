"""TIFF files, and Exif blocks, which are TIFF files without a picture: directories of tags.

TIFF 6.0, BigTIFF and Exif 2.3. A picture lies in cells (strips or tiles), each compressed by itself. libtiff
is not shown the directories as they are: one is written anew, with the first one's tags that describe pixels,
and only if the cells fit the picture and the file. Sizes are (height, width).
"""

from __future__ import annotations

import struct
from typing import Any

from PIL import TiffImagePlugin

from stepwell.structures import Size
from stepwell.views.contents import Contents, ImageError

__all__ = ["exif_orientation", "unpack_tiff"]

MAX_TAGS = 4_096  # in a directory
MAX_CELLS = 65_536  # strips or tiles
MAX_SAMPLES = 6  # of a pixel: colours and what is added to them

_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}
_INTEGERS = {1: "B", 3: "H", 4: "L", 16: "Q"}
_WIDTH, _HEIGHT, _COMPRESSION, _ORIENTATION, _SAMPLES, _PLANES = 256, 257, 259, 274, 277, 284
_STRIP_OFFSETS, _STRIP_HEIGHT, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_SINGLE_TAGS = frozenset((256, 257, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323))
_PIXEL_TAGS = _SINGLE_TAGS | {258, 273, 279, 320, 324, 325, 338, 339, 347, 529, 530, 531, 532}
_RAW, _JPEG, _LZMA = 1, 7, 34925
_CCITT, _LZW, _ZIP, _PACKBITS, _ZSTD, _WEBP = (2, 3, 4), 5, (8, 32946), 32773, 50000, 50001
_COMPRESSIONS = {_RAW, *_CCITT, _LZW, _JPEG, *_ZIP, _PACKBITS, _LZMA, _ZSTD, _WEBP}


class _Directory:
    """The first directory of a TIFF: tags, with values read when asked for."""

    def __init__(self, raw: bytes) -> None:
        if raw[:2] not in (b"II", b"MM"):
            raise ImageError("damaged TIFF: it has no byte order")
        self.raw = raw
        self.order = "<" if raw.startswith(b"II") else ">"
        big = self._unpack("H", 2)[0] == 43
        self.offset_code, self.count_code, self.entry_code = (
            ("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")
        )
        (position,) = self._unpack(self.offset_code, 8 if big else 4)
        (count,) = self._unpack(self.count_code, position)
        if count > MAX_TAGS:
            raise ImageError(f"TIFF of more than {MAX_TAGS:,} tags")
        position += struct.calcsize(self.order + self.count_code)
        self.entries: dict[int, tuple[int, int, bytes]] = {}
        for _ in range(count):
            tag, kind, length, field = self._unpack(self.entry_code, position)
            position += struct.calcsize(self.order + self.entry_code)
            if kind in _TYPE_SIZES and length > 0:
                self.entries.setdefault(tag, (kind, length, field))

    def _unpack(self, code: str, position: int) -> tuple[Any, ...]:
        return struct.unpack_from(self.order + code, self.raw, position)

    def span(self, tag: int) -> tuple[int, int]:
        """Where in the file a tag's values start and end; (0, 0) if they sit in the entry itself."""
        kind, length, field = self.entries[tag]
        size = length * _TYPE_SIZES[kind]
        if size <= len(field):
            return 0, 0
        (start,) = struct.unpack(self.order + self.offset_code, field)
        if start + size > len(self.raw):
            raise ImageError("truncated TIFF")
        return start, start + size

    def values(self, tag: int) -> tuple[int, ...]:
        """The integers of a tag; none where it is missing or holds something else."""
        kind, length, field = self.entries.get(tag, (0, 0, b""))
        if kind not in _INTEGERS:
            return ()
        start, end = self.span(tag)
        data = self.raw[start:end] if end else field
        return struct.unpack_from(f"{self.order}{length}{_INTEGERS[kind]}", data)

    def value(self, tag: int, default: int) -> int:
        return next(iter(self.values(tag)), default)

    def orientation(self) -> int:
        found = self.value(_ORIENTATION, 1)
        return found if 1 <= found <= 8 else 1

    def rebuilt(self) -> bytes:
        """The file with one directory, at its end, that holds the pixels' tags only."""
        kept = sorted((tag, *entry) for tag, entry in self.entries.items() if tag in _PIXEL_TAGS)
        raw = self.raw + b"\0" * (len(self.raw) % 2)
        start = struct.pack(self.order + self.offset_code, len(raw))
        return b"".join(
            (
                raw[: len(start)],
                start,
                raw[2 * len(start) :],
                struct.pack(self.order + self.count_code, len(kept)),
                *(struct.pack(self.order + self.entry_code, *entry) for entry in kept),
                struct.pack(self.order + self.offset_code, 0),
            )
        )


def unpack_tiff(raw: bytes) -> Contents:
    """The first picture of a TIFF file. Raises ImageError, or struct.error where the file ends too soon."""
    directory = _Directory(raw)
    for tag in _PIXEL_TAGS & directory.entries.keys():
        start, end = directory.span(tag)
        if tag in _SINGLE_TAGS and directory.entries[tag][1] != 1:
            raise ImageError("damaged TIFF: several values where one belongs")
        if end - start > 8 * MAX_CELLS:
            raise ImageError("damaged TIFF: too many values in a tag")
    size = directory.value(_HEIGHT, 0), directory.value(_WIDTH, 0)
    compression = directory.value(_COMPRESSION, _RAW)
    if compression not in _COMPRESSIONS:
        raise ImageError(f"TIFF compression {compression} is not read")
    data, orientation = directory.rebuilt(), directory.orientation()
    work = _tiff_work(directory, size, compression)
    return Contents("TIFF", TiffImagePlugin.TiffImageFile, data, size, orientation, work)


def _tiff_work(directory: _Directory, size: Size, compression: int) -> int:
    """Pixels visited cell by cell (strips or tiles); refuses cells that do not fit the picture or file."""
    height, width = size
    if tiled := _TILE_OFFSETS in directory.entries:
        cell = directory.value(_TILE_HEIGHT, 0), directory.value(_TILE_WIDTH, 0)
    else:
        cell = min(height, directory.value(_STRIP_HEIGHT, height)), width
    if min(*size, *cell) < 1:
        raise ImageError("damaged TIFF: an empty picture")
    area = cell[0] * cell[1]
    if area > 2**22 and area > 1.25 * height * width:
        raise ImageError(f"TIFF with tiles of {cell[1]} x {cell[0]} for {width} x {height} pixels")
    samples = directory.value(_SAMPLES, 1)
    if samples > MAX_SAMPLES:
        raise ImageError(f"TIFF of {samples} samples a pixel; at most {MAX_SAMPLES} are read")
    planes = samples if directory.value(_PLANES, 1) == 2 else 1
    count = -(-height // cell[0]) * -(-width // cell[1]) * planes
    offsets = directory.values(_TILE_OFFSETS if tiled else _STRIP_OFFSETS)
    lengths = directory.values(_TILE_BYTES if tiled else _STRIP_BYTES)
    if count > MAX_CELLS or len(offsets) != count:
        raise ImageError(f"damaged TIFF: {len(offsets):,} strips or tiles where {count:,} belong")
    if compression == _RAW:
        return count * (area + 10_000)
    if len(lengths) != count or sum(lengths) > len(directory.raw):
        raise ImageError("truncated TIFF")
    visits = count
    if compression == _JPEG:
        visits = sum(
            directory.raw.count(b"\xff\xda", at, at + n) for at, n in zip(offsets, lengths, strict=True)
        )
    return visits * (area + 10_000) + (60 * len(directory.raw) if compression == _LZMA else 0)


def exif_orientation(exif: bytes) -> int:
    """The orientation in an Exif block, with or without its "Exif" prefix; 1 (upright) if none is valid."""
    try:
        directory = _Directory(exif.removeprefix(b"Exif\0\0"))
        return directory.orientation()
    except (ImageError, struct.error):
        return 1
