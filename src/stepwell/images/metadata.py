"""What stands beside the pixels of an image file: the orientation is read, the rest is cut off before decoding.

Pillow refuses a PNG with a colour profile or a text of over a megabyte, though photos have them. A TIFF may list
tags that take gigabytes to read, or tags that libtiff heeds and Pillow does not. So of both formats the decoders
see the parts that describe pixels, and nothing else.

PNG: ISO/IEC 15948. TIFF 6.0, BigTIFF. Exif 2.3; an Exif block is a TIFF file without an image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["bare_png", "bare_tiff", "exif_orientation"]

_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
_ORIENTATION = 274
_TIFF_TAGS = frozenset(
    (256, 257, 258, 259, 262, 266, 273, _ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320)
    + (322, 323, 324, 325, 338, 339, 347, 529, 530, 531, 532)
)
_MAX_VALUES = 200_000  # of one tag: an offset for each strip or tile, or the three colours of 65,536 palette entries


def bare_png(raw: bytes) -> bytes:
    """The same PNG without text, profiles and later frames."""
    parts, start = [raw[:8]], 8
    while start + 8 <= len(raw):
        length, name = struct.unpack_from(">L4s", raw, start)
        end = start + length + 12
        if name in _PNG_CHUNKS:
            parts.append(raw[start:end])
        start = end
    return b"".join(parts)


def bare_tiff(raw: bytes) -> tuple[bytes, set[int]]:
    """The same TIFF with one directory, at its end: the tags of the first that describe pixels, each once; and
    which they are.

    Raises ValueError for a tag of too many values, KeyError or struct.error for what is no TIFF.
    """
    offset, count, entry = _formats(raw)
    tags: dict[int, bytes] = {}
    for tag, kind, length, field in _entries(raw):
        if tag in _TIFF_TAGS:
            if length > _MAX_VALUES:
                raise ValueError(f"a TIFF tag of {length:,} values")
            tags.setdefault(tag, struct.pack(entry, tag, kind, length, field))
    raw += bytes(len(raw) % 2)
    width = struct.calcsize(offset)  # the first offset stands behind as many bytes of magic numbers
    head = raw[:width] + struct.pack(offset, len(raw)) + raw[2 * width :]
    directory = b"".join(tags[tag] for tag in sorted(tags))
    return head + struct.pack(count, len(tags)) + directory + bytes(width), set(tags)


def exif_orientation(exif: bytes) -> int:
    """1 (upright) to 8, from an Exif block with or without its prefix; 1 where it tells none or is damaged."""
    block = exif.removeprefix(b"Exif\0\0")
    try:
        for tag, kind, _, field in _entries(block):
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(_formats(block)[0][0] + {3: "H", 4: "L"}[kind], field)
                return int(value)
    except (KeyError, struct.error):
        pass
    return 1


def _formats(raw: bytes) -> tuple[str, str, str]:
    """For struct: an offset, the number of tags in a directory, and a tag of it."""
    order = {b"II": "<", b"MM": ">"}[raw[:2]]
    if raw[2:4] in (b"+\0", b"\0+"):  # BigTIFF
        return order + "Q", order + "Q", order + "HHQ8s"
    return order + "L", order + "H", order + "HHL4s"


def _entries(raw: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The first directory: tag, type, number of values, and the field that holds them or points to them."""
    offset, count, entry = _formats(raw)
    (start,) = struct.unpack_from(offset, raw, struct.calcsize(offset))
    (tags,) = struct.unpack_from(count, raw, start)
    start += struct.calcsize(count)
    yield from struct.iter_unpack(entry, raw[start : start + tags * struct.calcsize(entry)])
