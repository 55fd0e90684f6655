"""Files built to hurt, and files that are something else: one line of refusal, at once."""

from __future__ import annotations

import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable

import pytest
from pictures import GREY_PICTURES, LOSSLESS, LOSSY, bmp, half_transparent, png, riff, saved, scene, tiff
from PIL import Image

from stepwell.images.open import ImageError, open_image


def many_scans() -> bytes:
    raw = saved(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * 3000 + raw[-2:]


def giant_tile() -> bytes:
    sides = {256: 16, 257: 16, 322: 20000, 323: 20000}
    return tiff(sides | {258: 8, 259: 8, 262: 1, 324: 200, 325: len(ZEROS)}, ZEROS)


JPEG = saved(scene(), "JPEG")
ZEROS = zlib.compress(bytes(2_000_000), 9)
GIF_HEAD = b"GIF89a\x01\0\x01\0\0\0\0"
BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 13000 x 13000": lambda: png(13000, 13000, 1, 0, bytes(1626 * 13000)),
    "png of 2**31 x 2**31": lambda: png(2**31, 2**31, 8, 2, b""),
    "png cut into crumbs": lambda: b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\x9e\x63\x97\x6d" * 110_000,
    "webp of 2**24 x 2**24": lambda: riff((b"VP8X", b"\x02" + bytes(3) + b"\xff" * 6), (b"ANIM", bytes(6))),
    "webp of 16384 x 16384": lambda: riff((b"VP8L", b"\x2f" + b"\xff" * 4 + bytes(4))),
    "gif of 65535 x 65535": lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02L\x01\0;",
    "gif of a far frame": lambda: GIF_HEAD + b",\xff\xff\xff\xff\x01\0\x01\0\0\x02\x02L\x01\0;",
    "gif of comments": lambda: GIF_HEAD + b"!\xfe\0" * 110_000,
    "gif of one long comment": lambda: GIF_HEAD + b"!\xfe" + b"\x01a" * 110_000,
    "bmp of 2**30 x 2**30": lambda: bmp(2**30, 2**30, 0, b""),
    "bmp of empty rows": lambda: bmp(6000, 6000, 1, b"\0\0" * 6000),
    "jpeg of 3000 scans": many_scans,
    "jpeg of 110000 segments": lambda: b"\xff\xd8" + b"\xff\xfe\0\x02" * 110_000 + JPEG[2:],
    "jpeg of 1000 tables": lambda: b"\xff\xd8" + (b"\xff\xdb\0\x43\0" + b"\x01" * 64) * 1000 + JPEG[2:],
    "tiff of 60000 x 60000": lambda: tiff({256: 60000, 257: 60000, 258: 8, 262: 1, 273: 8, 279: 9}),
    "tiff of a giant tile": giant_tile,
    "tiff of 5000 tags": lambda: tiff(dict.fromkeys(range(5000), 1)),
    "tiff of many samples": lambda: tiff({256: 16, 257: 16, 258: 8, 262: 1, 273: 8, 277: 65000, 279: 9}),
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


def test_text_and_profiles_that_swell_are_never_opened() -> None:
    swelling = {"zTXt": b"a\0\0" + ZEROS, "iCCP": b"a\0\0" + ZEROS, "iTXt": b"a\0\1\0\0\0" + ZEROS}
    raw = png(1, 1, 8, 2, b"\0\x01\x02\x03", **swelling)
    assert open_image(raw).getpixel((0, 0)) == (1, 2, 3)


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
def test_what_is_no_picture_is_refused(name: str) -> None:
    with pytest.raises(ImageError):
        open_image(IMPOSTORS[name])


@pytest.mark.parametrize(("format", "options"), [*LOSSLESS.values(), *LOSSY.values(), ("GIF", {})])
def test_a_truncated_file_is_refused(format: str, options: dict[str, object]) -> None:
    raw = saved(scene(), format, **options)
    with pytest.raises(ImageError):
        open_image(raw[: len(raw) * 4 // 10])


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    raw = bytearray(saved(scene(), "PNG"))
    raw[raw.index(b"IDAT") + 10] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        open_image(bytes(raw))


def mutated(raw: bytes, dice: random.Random) -> bytes:
    data = bytearray(raw)
    if dice.random() < 0.2:
        return bytes(data[: dice.randrange(len(data))])
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(min(len(data), dice.choice((120, len(data)))))
        data[place] = dice.choice((0, 255, data[place] ^ 1 << dice.randrange(8), dice.randrange(256)))
    return bytes(data)


def test_mutated_files_give_a_picture_or_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    originals = [
        saved(scene(), format, **options) for format, options in [*LOSSLESS.values(), *LOSSY.values()]
    ]
    originals += [*GREY_PICTURES.values(), saved(scene(), "GIF"), saved(half_transparent(), "TIFF")]
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
    assert all(line.isprintable() and len(line) < 200 for line in refusals)
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
