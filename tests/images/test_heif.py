"""AVIF by Pillow and HEIC by pillow-heif: upright once, the first frame, and refused by their headers."""

from __future__ import annotations

import io
import struct
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from image_files import HEIGHT, STORED, WIDTH, exif_of_rationals, half_transparent, saved, scene
from PIL import Image, features

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.images.metadata import bare_heif
from stepwell.images.open import image_size, open_image

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")


def heic(image: Image.Image, append_images: Sequence[Image.Image] = (), **options: object) -> bytes:
    heif = pytest.importorskip("pillow_heif").from_pillow(image)
    for other in append_images:
        heif.add_from_pillow(other)
    file = io.BytesIO()
    heif.save(file, **options)
    return file.getvalue()


def avif(image: Image.Image, **options: object) -> bytes:
    return saved(image, "AVIF", **options)


BOTH = pytest.mark.parametrize("encode", [avif, heic], ids=["avif", "heic"])


def difference(image: Image.Image, other: Image.Image) -> float:
    assert image.mode == "RGB"
    return float(np.abs(np.asarray(image).astype(int) - np.asarray(other)).mean())


@BOTH
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_upright_once(encode, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(scene()))))
    exif = Image.Exif()
    exif[274] = orientation
    raw = encode(stored, exif=exif.tobytes(), quality=95)
    upright = open_image(raw)
    assert image_size(raw) == (upright.height, upright.width) == (HEIGHT, WIDTH)
    assert difference(upright, scene()) < 12


@BOTH
def test_exif_and_xmp_do_not_turn_what_the_file_does_not(encode) -> None:
    """HEIF turns images by properties; what an Exif or XMP says besides is history."""
    raw = encode(scene(), quality=95, xmp=b'<x:xmpmeta tiff:Orientation="1"/>')
    raw = raw.replace(b'Orientation="1"', b'Orientation="6"')
    assert b'Orientation="6"' in raw
    assert difference(open_image(raw), scene()) < 12
    assert image_size(raw) == (HEIGHT, WIDTH)


@BOTH
def test_without_metadata_nothing_has_moved(encode) -> None:
    exif = Image.Exif()
    exif[270] = "a secret"
    raw = encode(scene(), exif=exif.tobytes(), xmp=b"<x:xmpmeta/>")
    bare = bare_heif(raw)
    assert len(bare) == len(raw)
    assert bare.count(b"skip") == 2
    assert open_image(raw) == open_image(bare)


@BOTH
def test_transparency_is_laid_over_white(encode) -> None:
    image = half_transparent().resize((64, 32), Image.Resampling.NEAREST)
    shown = np.asarray(open_image(encode(image, quality=95))).astype(int)
    assert np.abs(shown[4, 4] - 255).max() <= 4
    assert np.abs(shown[4, 60] - [227, 177, 127]).max() <= 8


@BOTH
def test_of_several_frames_the_first_is_taken(encode) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime")]
    raw = encode(frames[0], save_all=True, append_images=frames[1:])
    assert difference(open_image(raw), frames[0]) < 3


def test_grey_avif_and_ten_bits_are_read() -> None:
    assert (
        difference(open_image(avif(Image.new("L", (32, 32), 77))), Image.new("RGB", (32, 32), (77,) * 3)) < 2
    )


@BOTH
def test_a_small_file_of_a_huge_image_is_refused_by_its_header(encode) -> None:
    raw = encode(Image.new("L", (7000, 6000), 7), quality=10)
    assert len(raw) < 20_000
    start = time.process_time()
    for look in (open_image, image_size):
        with pytest.raises(ImageError, match=r"7000 x 6000 pixels is too large; .*max_pixels=42000000"):
            look(raw)
    assert time.process_time() - start < 0.5
    assert image_size(raw, limits=ImageLimits(max_pixels=42_000_000)) == (6000, 7000)


@BOTH
def test_a_header_that_tells_a_size_beyond_all_reason_is_refused(encode) -> None:
    raw = encode(Image.new("RGB", (128, 64)))
    huge = raw.replace(struct.pack(">II", 128, 64), struct.pack(">II", 2**31 - 1, 2**31 - 1))
    assert huge != raw
    with pytest.raises(ImageError):
        open_image(huge)


@BOTH
def test_metadata_that_takes_long_to_read_is_not_read(encode) -> None:
    exif = exif_of_rationals()
    raw = encode(scene(), quality=95, exif=b"Exif\0\0" + exif)
    start = time.process_time()
    open_image(raw)
    assert time.process_time() - start < 1


def test_more_tiles_than_an_image_needs_are_refused() -> None:
    raw = avif(scene())
    with pytest.raises(ImageError, match="too many tiles"):
        open_image(raw + b"\0\0\0\x08infe" * 1000)


@BOTH
def test_a_truncated_file_is_refused(encode) -> None:
    raw = encode(scene(), quality=95)
    for length in (12, 40, len(raw) * 4 // 10, len(raw) - 200):
        with pytest.raises(ImageError):
            open_image(raw[:length])


def test_a_missing_decoder_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"msf1\0\0\0\0hevcmsf1"):
        with pytest.raises(ImageError, match=r"HEIC needs pillow-heif: pip install 'stepwell\[heif\]'"):
            open_image(b"\0\0\0\x18ftyp" + brands)
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ImageError, match="without AVIF"):
        open_image(avif(scene()))
