"""Image files for the tests of opening: Pillow's own, and some made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 32


def scene() -> Image.Image:
    """Blocks of colour, different in every corner."""
    blocks = np.random.default_rng(7).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


LOSSLESS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff zip": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff packbits": ("TIFF", {"compression": "packbits"}),
    "tiff lzma": ("TIFF", {"compression": "lzma"}),
    "tiff zstd": ("TIFF", {"compression": "zstd"}),
    "bigtiff": ("TIFF", {"big_tiff": True}),
}
LOSSY = {
    "jpeg": ("JPEG", {"quality": 95}),
    "progressive jpeg": ("JPEG", {"quality": 95, "progressive": True}),
    "mpo": ("MPO", {"quality": 95, "save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))]}),
    "webp": ("WEBP", {"quality": 95}),
    "tiff jpeg": ("TIFF", {"compression": "jpeg", "quality": 95}),
    "avif": ("AVIF", {"quality": 95}),
}


GREY = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH)
GREY_IMAGES = {
    "8 bits": saved(Image.fromarray(GREY), "PNG"),
    "16 bits": saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "16 bits tiff": saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "16 bits big-endian": saved(Image.fromarray(GREY.astype(">u2") * 257), "TIFF"),
    "16 bits zipped": saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF", compression="tiff_lzw"),
    "32 bits": saved(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
    "floats to 1": saved(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
    "floats to 255": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "negative floats": saved(Image.fromarray(GREY.astype(np.float32) - 300), "TIFF"),
    "gif": saved(Image.fromarray(GREY), "GIF"),
    "bmp": saved(Image.fromarray(GREY), "BMP"),
}


def half_transparent() -> Image.Image:
    image = Image.new("RGBA", (4, 2), (200, 100, 0, 0))
    image.paste((200, 100, 0, 128), (2, 0, 4, 2))
    return image


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width: int, height: int, compression: int, data: bytes) -> bytes:
    palette = bytes(value for entry in range(256) for value in (entry, 0, 0, 0))
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + palette + data


Value = int | tuple[int, int, int]


def tiff(tags: dict[int, Value], data: bytes = b"", *, header: bytes = b"II*\0\x08\0\0\0") -> bytes:
    """A tag holds one number, or (type, how many, where in the file); `data` begins at `data_start(tags)`."""
    entries = (value if isinstance(value, tuple) else (4, 1, value) for _, value in sorted(tags.items()))
    packed = b"".join(
        struct.pack("<HHLL", tag, *entry) for tag, entry in zip(sorted(tags), entries, strict=True)
    )
    return header + struct.pack("<H", len(tags)) + packed + bytes(4) + data


def data_start(tags: dict[int, Value]) -> int:
    return 14 + 12 * len(tags)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


STORED = {  # Exif 2.3, tag 274: how an upright image is stored
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}

RATIONALS = struct.pack("<HHHLLL", 1, 2, 5, 500_000, 1000, 0)  # a directory: half a million GPS coordinates


def exif_of_rationals() -> bytes:
    directory = tiff({274: 6, 34853: 500})
    return directory.ljust(500, b"\0") + RATIONALS.ljust(4_000_500, b"\0")
