"""What a picture file says before it is decoded, and the part of it that a decoder has to see.

A file of a few kilobytes can ask a decoder for gigabytes or minutes, mostly through parts without pixels
(profiles, text, thumbnails, later frames) or by describing the same pixels again and again. So a file is
first read here, in a bounded number of steps: `unpack` gives its size, its orientation and an estimate of the
work of decoding it, and rebuilds it with nothing but the first picture's pixels. Pillow sees only that.

Sources: PNG (ISO/IEC 15948), JPEG (ITU-T T.81), WebP (RFC 9649), GIF89a, BMP; for TIFF see tiff.py.
Sizes are (height, width).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from stepwell.structures import Size
from stepwell.views.contents import Contents, ImageError
from stepwell.views.tiff import exif_orientation, unpack_tiff

__all__ = ["unpack"]

MAX_PARTS = 100_000  # segments, chunks or blocks that may surround the pixels of one picture
MAX_TABLES = 65_536  # bytes of JPEG tables before the first scan; four of each kind need under 2,000


def unpack(raw: bytes) -> Contents:
    """The contents of a PNG, JPEG (MPO too), WEBP, GIF, BMP or TIFF file, told apart by its first bytes.

    Raises ImageError with a reason, or some other exception of Python's where the file's structure ends too
    soon: to a caller both mean that the file is refused.
    """
    if not raw:
        raise ImageError("the file is empty")
    for signature, read in SIGNATURES.items():
        if signature.match(raw):
            return read(raw)
    raise ImageError("not a picture: only PNG, JPEG, WEBP, GIF, BMP and TIFF are read")


# PNG


def _unpack_png(raw: bytes) -> Contents:
    kept: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    orientation = 1
    for name, start, end in _png_chunks(raw):
        if name == b"IEND":
            break
        if name not in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf"):
            continue
        data = raw[start:end]
        if struct.pack(">I", zlib.crc32(data, zlib.crc32(name))) != raw[end : end + 4]:
            raise ImageError("damaged PNG: a checksum does not match")
        if name == b"IDAT":
            pixels.append(data)
        elif name == b"eXIf":
            orientation = exif_orientation(data)
        elif not pixels:
            kept.setdefault(name, data)
    header = kept[b"IHDR"]
    width, height, depth, colour = struct.unpack_from(">IIBB", header)
    if b"tRNS" in kept and colour in (0, 2):
        kept[b"tRNS"] = _png_transparent_value(kept[b"tRNS"], depth)
    chunks = [*kept.items(), (b"IDAT", b"".join(pixels)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, data) for name, data in chunks)
    return Contents("PNG", PngImagePlugin.PngImageFile, data, (height, width), orientation, height * width)


def _png_chunks(raw: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk's data."""
    position = 8
    for _ in range(MAX_PARTS):
        if position == len(raw):  # complete but for the end mark: the decoder will know if pixels are missing
            return
        length, name = struct.unpack_from(">I4s", raw, position)
        start, end = position + 8, position + 8 + length
        if end + 4 > len(raw):
            raise ImageError("truncated PNG")
        yield name, start, end
        position = end + 4
    raise ImageError(f"PNG of more than {MAX_PARTS:,} chunks")


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _png_transparent_value(data: bytes, depth: int) -> bytes:
    """The transparent colour in the 8 bits a sample that Pillow compares it with (16 for grey of 16 bits)."""
    values = struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2])
    if depth == 16 and len(values) == 3:
        scaled = [value >> 8 for value in values]
    elif 1 < depth < 8:
        scaled = [(value & (1 << depth) - 1) * 255 // ((1 << depth) - 1) for value in values]
    else:
        return data
    return struct.pack(f">{len(scaled)}H", *scaled)


# JPEG

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)  # not stuffing, fill or restart marks
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_JPEG_BARE = frozenset((*range(0x01, 0xC0), 0xD8))  # markers without a length behind them
_EOI, _SOS, _COM = 0xD9, 0xDA, 0xFE


def _unpack_jpeg(raw: bytes) -> Contents:
    tables: list[bytes] = []
    size: Size | None = None
    exif: bytes | None = None
    scans, first_scan, end, byte_work = 0, 0, len(raw), 8
    for marker, start, stop in _jpeg_segments(raw):
        if marker == _EOI:
            end = stop
            break
        if marker == _SOS:
            scans += 1
            first_scan = first_scan or start
        if first_scan:
            continue
        if marker == 0xE1 and exif is None and raw.startswith(b"Exif\0\0", start + 4):
            exif = raw[start + 4 : stop]
        if marker in _JPEG_FRAMES:
            size = struct.unpack_from(">HH", raw, start + 5)
            byte_work = 48 if marker in _JPEG_PROGRESSIVE else 8
        if _jpeg_needed(raw, marker, start):
            tables.append(raw[start:stop])
    if size is None or not first_scan:
        raise ImageError("damaged or truncated JPEG: no picture in it")
    if sum(map(len, tables)) > MAX_TABLES:
        raise ImageError("JPEG with tables that no picture needs")
    data = b"\xff\xd8" + b"".join(tables) + raw[first_scan:end]
    orientation = exif_orientation(exif or b"")
    work = scans * (size[0] * size[1] + 10_000) + byte_work * len(data)
    return Contents("JPEG", JpegImagePlugin.JpegImageFile, data, size, orientation, work)


def _jpeg_segments(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start (of the marker) and end of each segment; of a scan the header only."""
    position = 2
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(raw, position)
        if found is None:
            return
        start, position = found.span()
        marker = raw[start + 1]
        if marker != _EOI and marker not in _JPEG_BARE:
            if position + 2 > len(raw):
                return
            position += int.from_bytes(raw[position : position + 2], "big")
        yield marker, start, min(position, len(raw))
    raise ImageError(f"JPEG of more than {MAX_PARTS:,} segments")


def _jpeg_needed(raw: bytes, marker: int, start: int) -> bool:
    """Whether a decoder needs the segment: tables and frame, and the two marks that tell the colour space."""
    if marker in range(0xE0, 0xF0) or marker == _COM:
        return raw.startswith((b"JFIF\0", b"Adobe"), start + 4)
    return marker not in _JPEG_BARE and marker != _SOS


# WebP


def _unpack_webp(raw: bytes) -> Contents:
    chunks: dict[bytes, bytes] = {}
    for name, data in _riff_chunks(raw):
        chunks.setdefault(name, data)  # of an animation, the first frame
    kind = raw[12:16]
    names: tuple[bytes, ...] = (kind,)
    if kind == b"VP8X":
        header = chunks[b"VP8X"]
        width, height = (1 + int.from_bytes(header[i : i + 3], "little") for i in (4, 7))
        names = (b"VP8X", b"ANIM", b"ANMF") if b"ANMF" in chunks else (b"VP8X", b"ALPH", b"VP8 ", b"VP8L")
    else:
        width, height = _webp_size(kind, chunks[kind])
    body = b"WEBP" + b"".join(_riff_chunk(name, chunks[name]) for name in names if name in chunks)
    data = _riff_chunk(b"RIFF", body)
    orientation = exif_orientation(chunks.get(b"EXIF", b""))
    return Contents("WEBP", WebPImagePlugin.WebPImageFile, data, (height, width), orientation, height * width)


def _riff_chunks(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 12
    for _ in range(MAX_PARTS):
        if position + 8 > len(raw):
            return
        name, length = struct.unpack_from("<4sI", raw, position)
        if position + 8 + length > len(raw):
            raise ImageError("truncated WEBP")
        yield name, raw[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def _riff_chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _webp_size(kind: bytes, data: bytes) -> Size:
    """-> (width, height) from the head of a lossy or lossless bit stream."""
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    (bits,) = struct.unpack_from("<I", data, 1)
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)


# GIF


def _unpack_gif(raw: bytes) -> Contents:
    width, height, flags = struct.unpack_from("<HHB", raw, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    head, control, parts = raw[:position], b"", 0
    while raw[position] != 0x2C:  # a picture
        if raw[position] != 0x21:  # an extension: a label, then sub-blocks of which the last is empty
            raise ImageError("damaged GIF: no picture in it")
        start = position
        position += 2
        while raw[position]:
            position += 1 + raw[position]
            parts += 1
        position += 1
        if raw[start + 1] == 0xF9:
            control = raw[start:position]
        parts += 1
        if parts > MAX_PARTS:
            raise ImageError(f"GIF of more than {MAX_PARTS:,} blocks before its picture")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", raw, position + 1)
    size = max(height, top + frame_height), max(width, left + frame_width)
    data = head + control + raw[position:]
    return Contents("GIF", GifImagePlugin.GifImageFile, data, size, 1, size[0] * size[1] + len(raw))


# BMP


def _unpack_bmp(raw: bytes) -> Contents:
    (length,) = struct.unpack_from("<I", raw, 14)
    if length not in (12, 40, 52, 56, 64, 108, 124):
        raise ImageError("not a picture: it starts like a BMP but does not go on like one")
    if length == 12:
        width, height = struct.unpack_from("<HH", raw, 18)
        compression = 0
    else:
        width, height, _, _, compression = struct.unpack_from("<iiHHI", raw, 18)
    size = abs(height), width
    work = size[0] * size[1]
    if compression in (1, 2):  # run lengths, which Pillow reads in Python
        work = 90 * work + 200 * len(raw)
    return Contents("BMP", BmpImagePlugin.BmpImageFile, raw, size, 1, work)


SIGNATURES: dict[re.Pattern[bytes], Callable[[bytes], Contents]] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): _unpack_png,
    re.compile(rb"\xff\xd8\xff"): _unpack_jpeg,
    re.compile(rb"RIFF....WEBPVP8", re.DOTALL): _unpack_webp,
    re.compile(rb"GIF8[79]a"): _unpack_gif,
    re.compile(rb"BM"): _unpack_bmp,
    re.compile(rb"II[*+]\0|MM\0[*+]"): unpack_tiff,
}
