"""PNG, TIFF and HEIF files without their metadata: decoders are shown what describes pixels and nothing else.

Pillow refuses a PNG with a colour profile or a text of over a megabyte, though photos have them. A TIFF may
hold tags that take gigabytes to read, and tags that libtiff heeds and Pillow does not. An AVIF or HEIC
is turned by properties of its image; its Exif and XMP may say otherwise, or take minutes to read.
PNG: ISO/IEC 15948. TIFF 6.0 and BigTIFF. HEIF, of which AVIF and HEIC are kinds: ISO/IEC 23008-12.
"""

from __future__ import annotations

import re
import struct
import zlib

__all__ = ["bare_heif", "bare_png", "bare_tiff"]

_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf")
_TIFF_TAGS = frozenset((256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320))
_TIFF_TAGS |= {322, 323, 324, 325, 338, 339, 347, 529, 530, 531, 532}
_MAX_VALUES = 200_000  # of a tag: offsets of strips or tiles, colours of a palette of 65,536
_HEIF_METADATA = re.compile(rb"(infe\x02.{7}|infe\x03.{9})(?:Exif|mime)", re.DOTALL)  # XMP is a kind of mime


def bare_png(raw: bytes) -> bytes:
    """The same PNG without text, profiles and later frames. Raises ValueError for a wrong checksum."""
    parts, start = [raw[:8]], 8
    while start + 8 <= len(raw):
        length, name = struct.unpack_from(">L4s", raw, start)
        chunk = raw[start : start + length + 12]
        if name in _PNG_CHUNKS:
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise ValueError("a wrong checksum")
            parts.append(chunk)
        start += length + 12
    return b"".join(parts)


def bare_tiff(raw: bytes) -> tuple[bytes, set[int]]:
    """The same TIFF, whose first directory holds only the tags about pixels, each once, and is the last; and
    which tags these are.

    Raises ValueError for a tag of too many values, KeyError or struct.error for what is no TIFF.
    """
    order = {b"II": "<", b"MM": ">"}[raw[:2]]
    big = raw[2:4] in (b"+\0", b"\0+")
    offset, count, entry = (order + code for code in (("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")))
    (start,) = struct.unpack_from(offset, raw, struct.calcsize(offset))
    (length,) = struct.unpack_from(count, raw, start)
    start_of_tags = start + struct.calcsize(count)
    listed = raw[start_of_tags : start_of_tags + length * struct.calcsize(entry)]
    tags: dict[int, bytes] = {}
    for tag, kind, values, field in struct.iter_unpack(entry, listed):
        if tag in _TIFF_TAGS:
            if values > _MAX_VALUES:
                raise ValueError(f"a TIFF tag of {values:,} values")
            tags.setdefault(tag, struct.pack(entry, tag, kind, values, field))
    directory = struct.pack(count, len(tags)) + b"".join(tags.values()) + bytes(struct.calcsize(offset))
    return raw[:start] + directory + raw[start + len(directory) :], set(tags)


def bare_heif(raw: bytes) -> bytes:
    """The same file with Exif and XMP under a name that no decoder knows, so that nothing in it moves."""
    return _HEIF_METADATA.sub(rb"\1skip", raw)
