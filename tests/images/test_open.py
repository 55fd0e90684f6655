"""An image looks as it was made, upright and over white; everything else is one line of refusal."""

from __future__ import annotations

import base64
import io
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import (
    GREY,
    GREY_IMAGES,
    HEIGHT,
    LOSSLESS,
    LOSSY,
    STORED,
    WIDTH,
    bmp,
    half_transparent,
    png,
    saved,
    scene,
)
from PIL import Image, ImageOps

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.images.open import image_size, open_image, upright_rgb


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_exact_pixels(name: str) -> None:
    format, options = LOSSLESS[name]
    assert (pixels(open_image(saved(scene(), format, **options))) == pixels(scene())).all()


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_look_the_same(name: str) -> None:
    format, options = LOSSY[name]
    difference = pixels(open_image(saved(scene(), format, **options))) - pixels(scene())
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_turned_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(scene()))))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 95}}.get(format, {})
    file = saved(stored, format, exif=exif, **options)
    upright = open_image(file)
    assert image_size(file) == (upright.height, upright.width) == (scene().height, scene().width)
    assert image_size(Image.open(io.BytesIO(file))) == image_size(file)
    assert np.abs(pixels(upright) - pixels(scene())).mean() < 12
    assert not upright.getexif(), "a second transpose would turn it again"


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_leaves_the_image_as_stored(value: int) -> None:
    exif = Image.Exif()
    exif[274] = value
    assert (pixels(open_image(saved(scene(), "PNG", exif=exif))) == pixels(scene())).all()


@pytest.mark.parametrize(
    "exif",
    [b"", b"Exif\0\0", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"\0" * 40, b"x" * 65000],
)
def test_a_damaged_exif_block_does_not_spoil_the_image(exif: bytes) -> None:
    raw = saved(scene(), "JPEG", quality=95)
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    assert (pixels(open_image(raw[:2] + block + raw[2:])) == pixels(open_image(raw))).all()


@pytest.mark.parametrize("name", GREY_IMAGES)
def test_grey_of_any_depth_becomes_the_same_eight_bits(name: str) -> None:
    shown = pixels(open_image(GREY_IMAGES[name]))
    assert (shown == GREY[..., None]).all()


def test_not_a_number_is_black() -> None:
    values = np.full((2, 2), 1.0, dtype=np.float32)
    values[0, 0] = np.nan
    assert pixels(open_image(saved(Image.fromarray(values), "TIFF")))[..., 0].tolist() == [
        [0, 255],
        [255, 255],
    ]


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_transparency_is_laid_over_white(format: str, options: dict[str, object]) -> None:
    shown = pixels(open_image(saved(half_transparent(), format, **options)))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert np.abs(shown[0, 3] - [227, 177, 127]).max() <= 1


def test_transparent_palette_entries_and_grey_with_alpha_are_laid_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for raw in (saved(palette, "PNG", transparency=0), saved(palette, "GIF", transparency=0)):
        assert pixels(open_image(raw)).tolist() == [[[255] * 3, [40, 50, 60]]]
    grey = half_transparent().convert("LA")
    assert pixels(open_image(saved(grey, "PNG")))[0, 0].tolist() == [255, 255, 255]


def test_the_transparent_colour_of_a_png_is_found_at_every_depth() -> None:
    two_bits = png(2, 1, 2, 0, b"\0\xb0", tRNS=b"\0\x02")
    four_bits = png(2, 1, 4, 0, b"\0\x3f", tRNS=b"\0\x03")
    sixteen_grey = png(2, 1, 16, 0, b"\0" + b"\x12\x34\xff\xff", tRNS=b"\x12\x34")
    sixteen_colour = png(1, 1, 16, 2, b"\0" + b"\x12\x34\x56\x78\x9a\xbc", tRNS=b"\x12\x34\x56\x78\x9a\xbc")
    for raw in (two_bits, four_bits, sixteen_grey, sixteen_colour):
        assert (pixels(open_image(raw)) == 255).all()


def test_cmyk_lab_and_one_bit_images_have_their_colours() -> None:
    cmyk = Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (255, 0, 0, 0)])
    for raw in (saved(cmyk, "TIFF"), saved(cmyk, "JPEG", quality=100)):
        assert np.abs(pixels(open_image(raw)) - [0, 255, 255]).max() <= 2
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (255, 128, 128)])
    assert np.abs(pixels(open_image(saved(lab, "TIFF"))) - 255).max() <= 1
    line = Image.fromarray(np.array([[True, False]]))
    for raw in (saved(line, "TIFF", compression="group4"), saved(line, "PNG"), saved(line, "BMP")):
        assert pixels(open_image(raw)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (9, 5), colour) for colour in ("red", "lime", "blue")]
    options = {"WEBP": {"lossless": True}}.get(format, {})
    raw = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(open_image(raw)) == [255, 0, 0]).all()


def test_a_run_length_bmp_is_read() -> None:
    raw = bmp(4, 2, 1, b"\x04\x07\0\0\x02\x01\x02\x09\0\x01")  # rows from the bottom
    assert pixels(open_image(raw))[..., 2].tolist() == [[1, 1, 9, 9], [7, 7, 7, 7]]


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (ImageLimits(max_bytes=50), "max_bytes"),
        (ImageLimits(max_pixels=WIDTH * HEIGHT - 1), "max_pixels"),
        (ImageLimits(max_side=WIDTH - 1), "max_side"),
        (ImageLimits(max_aspect=1.4), "max_aspect"),
    ],
)
def test_each_limit_is_named_when_it_refuses(limits: ImageLimits, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        open_image(saved(scene(), "PNG"), limits=limits)
    assert open_image(saved(scene(), "PNG"), limits=ImageLimits(max_pixels=WIDTH * HEIGHT, max_side=WIDTH))


def test_a_refusal_names_all_that_would_let_the_image_in() -> None:
    raw = saved(Image.new("L", (500, 2)), "PNG")
    with pytest.raises(ImageError, match="500 x 2 pixels is too large") as refusal:
        open_image(raw, limits=ImageLimits(max_pixels=10, max_side=20))
    assert "limits=ImageLimits(max_pixels=1000, max_side=500, max_aspect=250)" in str(refusal.value)
    assert "--max-pixels 1000 --max-side 500 --max-aspect 250" in str(refusal.value)
    loose = ImageLimits(max_pixels=1000, max_side=500, max_aspect=250)
    assert open_image(raw, limits=loose).size == (500, 2)


def test_limits_may_be_infinite_or_floats() -> None:
    raw = saved(scene(), "PNG")
    endless = ImageLimits(**dict.fromkeys(ImageLimits.__slots__, math.inf))
    for limits in (endless, ImageLimits(max_bytes=1e6, max_pixels=2e8)):
        for source in (raw, io.BytesIO(raw)):
            assert open_image(source, limits=limits).size == (WIDTH, HEIGHT)
    for name in ImageLimits.__slots__:
        with pytest.raises(ValueError, match="limits"):
            ImageLimits(**{name: math.nan})
    with pytest.raises(TypeError, match=r"limits are stepwell\.ImageLimits, got dict"):
        open_image(raw, limits={"max_pixels": 5})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "AVIF"])
def test_limits_may_be_higher_than_those_of_pillow(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = saved(scene(), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_image(raw).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_aspect": 0.5}, {"max_seconds": 0}])
def test_limits_that_refuse_everything_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="limits"):
        ImageLimits(**limits)


class Slow(io.RawIOBase):
    """A file that gives a few bytes at a time, counts them, and never ends."""

    def __init__(self, raw: bytes = b"") -> None:
        self.given = 0
        self.raw = raw

    def read(self, count: int = -1) -> bytes:
        part = (self.raw or bytes(7))[self.given : self.given + 7] if self.raw else bytes(min(count, 7))
        self.given += len(part)
        return part


def test_paths_bytes_and_files_of_any_kind_are_read(tmp_path: Path) -> None:
    raw = saved(scene(), "PNG")
    path = tmp_path / "an image"
    path.write_bytes(raw)
    with path.open("rb") as file:
        for source in (
            raw,
            bytearray(raw),
            memoryview(raw),
            io.BytesIO(raw),
            Slow(raw),
            path,
            str(path),
            file,
        ):
            assert (pixels(open_image(source)) == pixels(scene())).all()


def test_data_urls_and_arrays_are_images_too() -> None:
    raw = saved(scene(), "PNG")
    for head in ("data:image/png;base64,", "DATA:;base64,"):
        assert (pixels(open_image(head + base64.b64encode(raw).decode())) == pixels(scene())).all()
    colours = np.asarray(scene())
    assert (pixels(open_image(colours)) == colours).all()
    assert (pixels(open_image(GREY)) == GREY[..., None]).all()
    assert (pixels(open_image(np.zeros((2, 3, 4), dtype=np.uint8))) == 255).all(), "transparent"
    assert (pixels(open_image(scene())) == colours).all()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("data:image/png,rest", "base64-encoded"),
        ("data:image/png;base64,????", "not valid base64"),
        ("https://example.com/a.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
    ],
)
def test_other_urls_are_refused(source: object, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        open_image(source)


def test_a_dict_of_bytes_or_a_path_is_an_image_as_the_datasets_library_has_them(tmp_path: Path) -> None:
    raw, path = saved(scene(), "PNG"), tmp_path / "a.png"
    path.write_bytes(raw)
    for source in (
        {"bytes": raw, "path": None},
        {"bytes": bytearray(raw), "path": "nowhere.png"},
        {"bytes": None, "path": str(path)},
        {"path": path},
    ):
        assert (pixels(open_image(source)) == pixels(scene())).all()
        assert image_size(source) == (HEIGHT, WIDTH)
    for other in (
        {},
        {"bytes": str(path)},
        {"bytes": None, "path": None},
        {"path": [str(path)]},
        {"url": "a"},
    ):
        with pytest.raises(TypeError, match="a dict is an image where its `bytes` are bytes"):
            open_image(other)


def test_files_of_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with (tmp_path / "a.txt").open() as file:
        for source in (file, io.StringIO("words")):
            with pytest.raises(TypeError, match=r"open it with open\(path, 'rb'\)"):
                open_image(source)

    class Wordy:
        def read(self, count: int) -> str:
            return "words"

    with pytest.raises(TypeError, match="got one that gives str"):
        open_image(Wordy())
    released = memoryview(b"raw")
    released.release()
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(released)


def test_a_pillow_image_that_is_damaged_closed_or_empty_is_refused_in_one_line() -> None:
    whole = saved(scene(), "JPEG")
    damaged, closed = Image.open(io.BytesIO(whole[:-200])), Image.open(io.BytesIO(whole))
    closed.close()
    for source, says in [
        (damaged, "damaged or unsupported JPEG"),
        (closed, "damaged or unsupported JPEG"),
        (Image.new("RGB", (0, 5)), "at least one pixel each way, got 0 x 5"),
    ]:
        with pytest.raises(ImageError, match=says):
            open_image(source)
    with pytest.raises(ImageError, match="got 0 x 5"):
        image_size(Image.new("RGB", (0, 5)))


def test_no_file_is_read_further_than_one_byte_past_the_limit() -> None:
    endless = Slow()
    with pytest.raises(ImageError, match="larger than 1,000 bytes"):
        open_image(endless, limits=ImageLimits(max_bytes=1000))
    assert endless.given == 1001


def test_a_file_of_a_terabyte_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match="max_bytes"):
        open_image(tmp_path / "large.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_what_might_never_end_or_never_begin_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ImageError, match="a pipe or a device"):
            open_image(path)


def test_missing_files_folders_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError):
        open_image("")
    with pytest.raises(ImageError, match="is empty"):
        open_image(b"")
    for source, match in [(tmp_path, "directory"), ("a" * 5000, "too long"), ("a\0b", "cannot be read")]:
        with pytest.raises(ImageError, match=match):
            open_image(source)
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(closed)


@pytest.mark.parametrize("source", [None, 0, 3.5, ["a"], (b"a",), [[0, 1], [2, 3]], {b"a"}, object()])
def test_other_kinds_of_source_are_a_type_error(source: object) -> None:
    with pytest.raises(TypeError, match="an image is a path, bytes"):
        open_image(source)


MODES = [
    "1",
    "L",
    "P",
    "LA",
    "La",
    "PA",
    "RGB",
    "RGBX",
    "RGBA",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_of_any_mode_becomes_plain_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 3))
    image.info["comment"] = "not plain"
    plain = upright_rgb(image)
    assert (type(plain), plain.mode, plain.size, plain.info) == (Image.Image, "RGB", (5, 3), {})
    assert image.info == {"comment": "not plain"}
    assert upright_rgb(plain) is plain


def test_a_file_that_pillow_reads_later_is_read_now() -> None:
    file = io.BytesIO(saved(scene(), "BMP"))
    with Image.open(file) as image:
        image.info.clear()
        opened = open_image(image)
    file.close()
    assert (pixels(opened) == pixels(scene())).all()


@pytest.mark.parametrize(("format", "copies"), [("PNG", 1), ("JPEG", 1), ("array", 0), ("image", 0)])
def test_an_image_is_copied_once_however_often_it_is_opened(
    format: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"array": np.asarray(scene()), "image": scene()}.get(format)
    source = saved(scene(), format) if source is None else source
    copied: list[str] = []
    for name in ("copy", "convert"):
        method = getattr(Image.Image, name)

        def counted(image: Image.Image, *args: object, name: str = name, method: Any = method) -> Any:
            copied.append(name)
            return method(image, *args)

        monkeypatch.setattr(Image.Image, name, counted)
    opened = open_image(source)
    assert open_image(opened) is opened
    assert len(copied) == copies, copied


@pytest.mark.parametrize("orientation", STORED)
def test_a_pillow_image_is_turned_as_pillow_turns_it_and_left_as_it_was(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.open(io.BytesIO(saved(scene(), "PNG", exif=exif)))
    upright = upright_rgb(image)
    assert (pixels(upright) == pixels(ImageOps.exif_transpose(image))).all()
    assert (pixels(upright_rgb(upright)) == pixels(upright)).all()
    assert (pixels(image) == pixels(scene())).all()


def test_decoding_needs_neither_torch_nor_transformers() -> None:
    code = "import sys\nimport stepwell.images.open\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_size_is_told_without_decoding_and_refused_as_the_image_would_be(tmp_path: Path) -> None:
    whole = saved(scene(), "JPEG")
    cut = whole[:-100]
    assert image_size(cut) == (scene().height, scene().width)
    with pytest.raises(ImageError):
        open_image(cut)
    assert image_size(np.zeros((3, 5), np.uint8)) == (3, 5)
    with pytest.raises(ImageError, match="max_pixels=1536"):
        image_size(whole, limits=ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match="not an image"):
        image_size(b"text")
    with pytest.raises(FileNotFoundError):
        image_size(tmp_path / "none.png")
