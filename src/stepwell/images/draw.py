"""What a model has found, drawn over a picture: boxes, masks, maps of classes, captions.

Sizes are (height, width), boxes xyxy in pixels. Colours of classes are far apart for neighbours in number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from stepwell.folders import whole_file
from stepwell.structures import Box

__all__ = [
    "Colour",
    "check_target",
    "check_unsigned",
    "class_colours",
    "draw_boxes",
    "draw_lines",
    "ink_on",
    "refuse_pictures",
    "save_signed",
    "save_whole",
    "tint",
    "tint_classes",
]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Colour = tuple[int, int, int]
"""Red, green, blue."""

STRENGTH = 128  # of 256, of a colour over a picture
SIGNATURE = ("Software", "Stepwell")  # in a PNG's text
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ROWS = 256  # of a picture that are tinted at a time
HIDDEN = 0.25  # of a box, at most, by the caption of another
GOLDEN = 0.6180339887498949  # of a turn around the circle of hues, from one class to the next


def class_colours(count: int) -> list[Colour]:
    """Of classes 0 to count - 1."""
    hues = [int(256 * (0.58 + i * GOLDEN)) % 256 for i in range(count)]
    wheel = Image.new("HSV", (max(count, 1), 1))
    wheel.putdata([(hue, 200, 230 - 60 * (i // 3 % 3)) for i, hue in enumerate(hues)] or [(0, 0, 0)])
    colours = np.asarray(wheel.convert("RGB"))[0, :count].tolist()
    return [(red, green, blue) for red, green, blue in colours]


def tint(pixels: Pixels, mask: np.ndarray[Any, np.dtype[np.bool_]], colour: Colour | Pixels) -> None:
    """Lays a colour, or one for each pixel (h, w, 3), over pixels (h, w, 3), in place, where the mask (h, w)
    is.
    """
    colours = np.broadcast_to(np.array(colour, np.uint16), pixels.shape)
    pixels[mask] = _mixed(pixels[mask], colours[mask])


def tint_classes(pixels: Pixels, labels: np.ndarray[Any, Any], colours: Sequence[Colour]) -> None:
    """Lays the colour of its class over every pixel (H, W, 3), in place."""
    table = np.array(colours, np.uint16)
    for top in range(0, len(pixels), ROWS):
        rows = slice(top, top + ROWS)
        pixels[rows] = _mixed(pixels[rows], table[labels[rows]])


def _mixed(pixels: Pixels, colour: np.ndarray[Any, np.dtype[np.uint16]]) -> Pixels:
    mixed = (pixels.astype(np.uint16) * (256 - STRENGTH) + colour * STRENGTH) >> 8
    return mixed.astype(np.uint8)


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], captions: Sequence[str], colours: Sequence[Colour]
) -> None:
    """Draws on the image, the last box on top; each caption above its box, at the border inside of it, or
    below. One that would hide another caption, or much of another box, is left out: the last boxes have
    theirs first.
    """
    draw, font, width = ImageDraw.Draw(image), _font(image), max(2, max(image.size) // 600)
    for (left, top, right, bottom), colour in zip(boxes, colours, strict=True):
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=width)
    edges = np.array(boxes, float).reshape(-1, 4)
    written = np.zeros((0, 4))
    for i in reversed(range(len(boxes))):
        others = np.delete(edges, i, 0)
        length = font.getlength(captions[i]) + 4
        x = max(0.0, min(boxes[i][0], image.width - length))
        for y in _lines_of(boxes[i], image.height, _height(font)):
            plate = (x, y, x + length, y + _height(font))
            if not (_covered(plate, written) > 0).any() and not (_covered(plate, others) > HIDDEN).any():
                _write(draw, (x, y), captions[i], colours[i], font)
                written = np.vstack([written, plate])
                break


def _lines_of(box: Box, bottom: int, height: int) -> list[float]:
    """Upper edges of a caption of a box, the best first."""
    _, top, _, low = box
    above = top - height if top >= height else top
    return [above, low] if low + height <= bottom else [above]


def _covered(plate: Box, boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The share of each box (n, 4) that lies under a plate."""
    low, high = np.maximum(boxes[:, :2], plate[:2]), np.minimum(boxes[:, 2:], plate[2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    shares: np.ndarray[Any, Any] = (high - low).clip(min=0).prod(1) / np.maximum(areas, 1e-9)
    return shares


def draw_lines(image: Image.Image, lines: Sequence[str], colours: Sequence[Colour]) -> None:
    """Writes lines on the image, from its top left corner down."""
    draw, font = ImageDraw.Draw(image), _font(image)
    for i, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        _write(draw, (0, i * _height(font)), line, colour, font)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: Colour, font: Any
) -> None:
    x, y = place
    draw.rectangle((x, y, x + font.getlength(text) + 4, y + _height(font) - 1), fill=colour)
    draw.text((x + 2, y + 1), text, fill=ink_on(colour), font=font)


def ink_on(colour: Colour) -> str:
    """In which text is legible there: white, or black where the colour is light."""
    return "black" if 299 * colour[0] + 587 * colour[1] + 114 * colour[2] > 140_000 else "white"


def _font(image: Image.Image) -> Any:
    return ImageFont.load_default(max(12, max(image.size) // 80))


def _height(font: Any) -> int:
    return int(font.size * 1.3) + 2


def save_whole(image: Image.Image, path: Path) -> None:
    """To a file whose name's ending tells the format. It is there whole, or as it was before."""
    with whole_file(path) as draft:
        image.save(draft)


def save_signed(image: Image.Image, path: Path) -> None:
    """A PNG that `check_unsigned` knows for a drawing, whole or as it was before."""
    signature = PngInfo()
    signature.add_text(*SIGNATURE)
    with whole_file(path) as draft:
        image.save(draft, "PNG", pnginfo=signature)


def check_unsigned(paths: Iterable[Path]) -> None:
    """Raises ValueError for a file that is there and no drawing of `save_signed`."""
    for path in paths:
        if path.exists() and not _is_signed(path):
            raise ValueError(f"{path} is there, and no drawing of Stepwell's; name another folder")


def _is_signed(path: Path) -> bool:
    try:
        with PngImageFile(path) as image:  # which minds no number of pixels
            key, value = SIGNATURE
            return image.info.get(key) == value
    except (OSError, SyntaxError, ValueError):
        return False


def check_target(path: Path, pictures: Iterable[str | Path] = ()) -> None:
    """Raises ValueError where `save_whole` could not write to `path`, and where that is one of the pictures
    that are looked at.
    """
    refuse_pictures([path], pictures)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'not permitted'}")


def refuse_pictures(targets: Iterable[Path], pictures: Iterable[str | Path]) -> None:
    """Raises ValueError for a file to be written that is one of the pictures, by whatever name."""
    looked_at = {_on_disk(Path(picture)) for picture in pictures} - {None}
    for target in targets:
        if _on_disk(target) in looked_at:
            raise ValueError(
                f"{target} is one of the pictures, and would be written over; name another place"
            )


def _on_disk(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return None
    return about.st_dev, about.st_ino
