"""Files built to hurt, and files that are something else: one line of refusal, at once."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import (
    GREY_IMAGES,
    LOSSLESS,
    LOSSY,
    RATIONALS,
    Value,
    bmp,
    data_start,
    exif_of_rationals,
    half_transparent,
    png,
    riff,
    saved,
    scene,
    tiff,
)
from PIL import Image

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.images.open import open_image

JPEG = saved(scene(), "JPEG")
GREY_JPEG = saved(Image.new("L", (16, 16)), "JPEG")
ZEROS = zlib.compress(bytes(2_000_000), 9)
GIF_HEAD = b"GIF89a\x01\0\x01\0\0\0\0"
GREY_TIFF = {256: 16, 257: 16, 258: 8, 262: 1}


def giant_tile() -> bytes:
    return tiff(GREY_TIFF | {259: 8, 322: 20000, 323: 20000, 324: 200, 325: len(ZEROS)}, ZEROS)


def strips_in_one_place(counts: int, kind: int = 4) -> bytes:
    """64 rows of 16 pixels, a strip each: every one reaches over the whole file."""
    tags: dict[int, Value] = GREY_TIFF | {257: 64, 259: 8, 278: 1, 279: (4, 64, 500), 273: (4, 64, 1000)}
    tags[counts] = (kind, 64, 1500)
    row, start = zlib.compress(bytes(16)), data_start(tags)
    data = bytearray(3000 - start)
    data[: len(row)] = row
    for place, values in ((500, [len(row)] * 64), (1000, [start] * 64)):
        struct.pack_into("<64L", data, place - start, *values)
    struct.pack_into("<64L" if kind == 4 else "<64Q", data, 1500 - start, *[2000] * 64)
    return tiff(tags, bytes(data))


BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 13000 x 13000": lambda: png(13000, 13000, 1, 0, bytes(1626 * 13000)),
    "png of 2**31 x 2**31": lambda: png(2**31, 2**31, 8, 2, b""),
    "png cut into crumbs": lambda: b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\x9e\x63\x97\x6d" * 110_000,
    "webp of 2**24 x 2**24": lambda: riff((b"VP8X", b"\x02" + bytes(3) + b"\xff" * 6), (b"ANIM", bytes(6))),
    "webp of 16384 x 16384": lambda: riff((b"VP8L", b"\x2f" + b"\xff" * 4 + bytes(4))),
    "gif of 65535 x 65535": lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02L\x01\0;",
    "gif of a far frame": lambda: GIF_HEAD + b",\xff\xff\xff\xff\x01\0\x01\0\0\x02\x02L\x01\0;",
    "gif of comments": lambda: GIF_HEAD + b"!\xfe\0" * 30_000,
    "gif of one long comment": lambda: GIF_HEAD + b"!\xfe" + b"\x01a" * 30_000,
    "bmp of 2**30 x 2**30": lambda: bmp(2**30, 2**30, 0, b""),
    "bmp of empty rows": lambda: bmp(6000, 6000, 1, b"\0\0" * 6000),
    "jpeg of 40 exif blocks": lambda: b"\xff\xd8" + b"\xff\xe1\0\x08Exif\0\0" * 40 + JPEG[2:],
    "tiff of 60000 x 60000": lambda: tiff({256: 60000, 257: 60000, 258: 8, 262: 1, 273: 8, 279: 9}),
    "tiff of a giant tile": giant_tile,
    "tiff of strips in one place": lambda: strips_in_one_place(279),
    "tiff of strips that only libtiff sees": lambda: strips_in_one_place(325, 17),
    "tiff of 3 million strips": lambda: tiff(GREY_TIFF | {273: (1, 3_000_000, 200)}, bytes(3_000_300)),
    "tiff of 5000 tags": lambda: tiff(dict.fromkeys(range(5000), 1)),
    "tiff of many samples": lambda: tiff(GREY_TIFF | {273: 8, 277: 65000, 279: 9}),
    "tiff pointing at itself": lambda: tiff({}, header=b"II*\0\x04\0\0\0"),
    "bigtiff of 2**64 tags": lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**64 - 1) + bytes(99),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name: str) -> None:
    bomb = BOMBS[name]()
    start = time.process_time()
    with pytest.raises(ImageError):
        open_image(bomb)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(("counts", "kind"), [(279, 4), (325, 4), (325, 17)])
def test_strips_larger_than_the_file_are_found_wherever_they_stand(counts: int, kind: int) -> None:
    with pytest.raises(ImageError, match="strips"):
        open_image(strips_in_one_place(counts, kind))


def test_a_tile_far_larger_than_its_image_is_not_decoded() -> None:
    with pytest.raises(ImageError, match="tiles of 20000 x 20000"):
        open_image(giant_tile())


def test_a_tiff_without_compression_may_tell_wrong_lengths() -> None:
    raw = tiff(GREY_TIFF | {273: 100, 279: 1_000_000}, bytes(300))
    assert open_image(raw).getextrema() == ((0, 0),) * 3


def test_of_a_tiff_tag_told_twice_the_first_counts() -> None:
    raw = tiff(GREY_TIFF | {273: 200, 999: 8}, bytes(500))
    twice = raw.replace(struct.pack("<HH", 999, 4), struct.pack("<HH", 257, 4))
    assert open_image(twice).size == (16, 16)


def many_scans() -> bytes:
    raw = saved(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * 3000 + raw[-2:]


SLOW: dict[str, Callable[[], bytes]] = {
    "jpeg of 3000 scans": many_scans,
    "jpeg of comments": lambda: b"\xff\xd8" + b"\xff\xfe\0\x02" * 500_000 + JPEG[2:],
    "jpeg of fill bytes": lambda: b"\xff\xd8" + b"\xff" * 2_000_000 + JPEG[2:],
    "png of empty pixel chunks": lambda: (
        b"\x89PNG\r\n\x1a\n" + png(1, 1, 8, 2, b"")[8:33] + b"\0\0\0\0IDAT\x35\xaf\x06\x1e" * 150_000
    ),
    "gif of comments": lambda: GIF_HEAD + b"!\xfe\0" * 2_000_000,
    "bmp of run lengths": lambda: bmp(6000, 6000, 1, b"\x01\x05" * 2_000_000),
}


@pytest.mark.parametrize("name", SLOW)
def test_files_that_take_long_are_given_up(name: str) -> None:
    slow = SLOW[name]()
    start = time.process_time()
    with pytest.raises(ImageError, match="max_seconds"):
        open_image(slow, limits=ImageLimits(max_seconds=0.1))
    assert time.process_time() - start < 1


def test_text_and_profiles_that_swell_are_never_opened() -> None:
    swelling = {"zTXt": b"a\0\0" + ZEROS, "iCCP": b"a\0\0" + ZEROS, "iTXt": b"a\0\1\0\0\0" + ZEROS}
    raw = png(1, 1, 8, 2, b"\0\x01\x02\x03", **swelling)
    assert open_image(raw).getpixel((0, 0)) == (1, 2, 3)


HARMLESS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(16, 16, 8, 0, bytes(17 * 16), eXIf=exif_of_rationals()),
    "webp": lambda: saved(Image.new("L", (16, 16)), "WEBP", lossless=True, exif=exif_of_rationals()),
    "tiff": lambda: tiff(GREY_TIFF | {273: 200, 34853: 500}, bytes(414)) + RATIONALS + bytes(4_000_500),
    "jpeg of 1000 tables": lambda: b"\xff\xd8" + (b"\xff\xdb\0\x43\0" + b"\x01" * 64) * 1000 + GREY_JPEG[2:],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_metadata_of_any_size_costs_nothing(name: str) -> None:
    raw = HARMLESS[name]()
    start = time.process_time()
    image = open_image(raw)
    assert time.process_time() - start < 0.5
    assert image.size == (16, 16)
    assert image.getextrema() == ((0, 0),) * 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells the peak of memory")
def test_an_image_of_the_largest_size_would_take_less_than_a_gibibyte() -> None:
    code = (
        "import io, sys\n"
        "from PIL import Image\n"
        "from stepwell.images.open import open_image\n"
        "file = io.BytesIO()\n"
        "Image.new('F', (4000, 4000), 3.5).save(file, 'TIFF', compression='tiff_adobe_deflate')\n"
        "assert open_image(file.getvalue()).size == (4000, 4000)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=-1).stdout)
    assert peak * 1024 < 2**30 * 4000**2 / ImageLimits().max_pixels


IMPOSTORS = {
    "empty": b"",
    "text": b"Some words.",
    "html": b"<!DOCTYPE html><html></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "fits": saved(Image.new("L", (4, 4)), "PNG").replace(b"\x89PNG", b"SIMPLE  = T"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "ppm": b"P6 1 1 255\nabc",
    "pickle": b"\x80\x04\x95",
    "bitmap talk": b"BM is the mark of a bitmap, and this is a text about bitmaps.",
    "png mark": b"\x89PNG\r\n\x1a\n",
    "jpeg mark": b"\xff\xd8\xff",
    "webp mark": b"RIFF\x10\0\0\0WEBPVP8L",
    "gif mark": b"GIF89a",
    "tiff mark": b"II*\0",
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_is_no_image_is_refused(name: str) -> None:
    with pytest.raises(ImageError):
        open_image(IMPOSTORS[name])


@pytest.mark.parametrize(("format", "options"), [*LOSSLESS.values(), *LOSSY.values(), ("GIF", {})])
def test_a_truncated_file_is_refused(format: str, options: dict[str, object]) -> None:
    raw = saved(scene(), format, **options)
    with pytest.raises(ImageError):
        open_image(raw[: len(raw) * 4 // 10])


@pytest.mark.parametrize(
    ("compression", "data"), [(1, bytes(256)), (8, zlib.compress(bytes(256))), (32773, b"\x81\0" * 2)]
)
def test_a_tiff_that_lacks_its_last_byte_is_refused(compression: int, data: bytes) -> None:
    tags = GREY_TIFF | {259: compression, 273: data_start(GREY_TIFF) + 36, 279: len(data)}
    raw = tiff(tags, data)
    assert open_image(raw).getextrema() == ((0, 0),) * 3
    with pytest.raises(ImageError):
        open_image(raw[:-1])


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    whole, changed = (png(1, 1, 8, 0, bytes((0, grey))) for grey in (3, 4))
    with pytest.raises(ImageError, match="damaged"):
        open_image(changed[:-16] + whole[-16:-12] + changed[-12:])


def mutated(raw: bytes, dice: random.Random) -> bytes:
    data = bytearray(raw)
    if dice.random() < 0.2:
        return bytes(data[: dice.randrange(len(data))])
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(min(len(data), dice.choice((120, len(data)))))
        data[place] = dice.choice((0, 255, data[place] ^ 1 << dice.randrange(8), dice.randrange(256)))
    return bytes(data)


def test_mutated_files_give_an_image_or_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    originals = [
        saved(scene(), format, **options) for format, options in [*LOSSLESS.values(), *LOSSY.values()]
    ]
    originals += [*GREY_IMAGES.values(), saved(scene(), "GIF"), saved(half_transparent(), "TIFF")]
    dice = random.Random(11)
    modes: list[str] = []
    refusals: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1200):
            try:
                modes.append(open_image(mutated(dice.choice(originals), dice)).mode)
            except ImageError as error:
                refusals.append(str(error))
    assert len(modes) > 100
    assert set(modes) == {"RGB"}
    assert len(refusals) > 100
    assert all(line.isprintable() and len(line) < 300 for line in refusals)
    assert capfd.readouterr() == ("", "")


def test_an_error_never_repeats_the_payload() -> None:
    secret = b"SECRET" * 20
    for raw in (
        secret,
        b"BM" + secret,
        saved(scene(), "PNG")[:20] + secret,
        b"GIF89a" + secret,
        b"II*\0" + secret,
    ):
        with pytest.raises(ImageError) as caught:
            open_image(raw)
        assert "SECRET" not in str(caught.value)
        assert caught.value.__cause__ is None
