"""What printing and scanning do to a page: thick, thin and faint print, skew, shades, grain, specks, JPEG."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from stepwell.reader.page import Line

__all__ = ["scanned"]

Ink = NDArray[np.uint8]


def scanned(
    ink: Ink, lines: Sequence[Line], chance: random.Random, *, worn: float
) -> tuple[Image.Image, list[Line | None]]:
    """Coverage (H, W) -> the page as a scanner sees it, and where its lines are then; None for one that has
    left the page. worn: how many of the pages are skewed, faint, noisy or compressed.
    """
    numbers = np.random.default_rng(chance.getrandbits(64))
    is_worn = chance.random() < worn
    placed: list[Line | None] = list(lines)
    if is_worn:
        ink = _printed(ink, chance, numbers)
        if chance.random() < 0.5:
            ink, placed = _skewed(ink, lines, math.radians(chance.uniform(-2.0, 2.0)))
    if softness := chance.choice((0.0, 0.0, 0.4, 0.7, 1.0)):
        ink = np.asarray(Image.fromarray(ink).filter(ImageFilter.GaussianBlur(softness)))
    page = _shaded(ink, chance, numbers)
    if is_worn and chance.random() < 0.4:
        _speckle(page, chance, numbers)
    image = Image.fromarray(page)
    if is_worn and chance.random() < 0.5:
        image = _recompressed(image, chance.randint(25, 80))
    return image.convert("RGB"), placed


def _printed(ink: Ink, chance: random.Random, numbers: np.random.Generator) -> Ink:
    """Bold, thin, in dots, or faint in bands and spots."""
    style = chance.random()
    if style < 0.15:
        ink = np.maximum(ink, np.roll(ink, 1, axis=1))
    elif style < 0.3:
        ink = np.minimum(ink, np.roll(ink, 1, axis=0) // 2 + ink // 2)
    elif style < 0.4:
        ink = ink.copy()
        ink[:: chance.choice((2, 3))] //= 3
    if chance.random() < 0.5:
        depth = chance.uniform(0.2, 0.7)
        axis = chance.randrange(2)
        length = ink.shape[axis]
        places = np.linspace(0, 1, 8)
        strength = 1 - depth * numbers.random(8).round(1)
        profile = np.interp(np.linspace(0, 1, length), places, strength).astype(np.float32)
        ink = (ink * (profile[:, None] if axis == 0 else profile[None])).astype(np.uint8)
    if chance.random() < 0.3:
        holes = numbers.random((96, 96), dtype=np.float32) > chance.uniform(0.05, 0.25)
        ink = ink * _tiled(holes, ink.shape)
    return ink


def _skewed(ink: Ink, lines: Sequence[Line], angle: float) -> tuple[Ink, list[Line | None]]:
    """Turned about the middle, clockwise for positive angles."""
    height, width = ink.shape
    centre = (width / 2, height / 2)
    sine, cosine = math.sin(angle), math.cos(angle)

    def there(x: float, y: float) -> tuple[float, float]:
        x, y = x - centre[0], y - centre[1]
        return centre[0] + cosine * x - sine * y, centre[1] + sine * x + cosine * y

    # Pillow wants the way back, from a place on the turned page to the one it came from.
    back = (
        *(cosine, sine, centre[0] - cosine * centre[0] - sine * centre[1]),
        *(-sine, cosine, centre[1] + sine * centre[0] - cosine * centre[1]),
    )
    turned = Image.fromarray(ink).transform(
        (width, height), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
    )
    placed: list[Line | None] = []
    for line in lines:
        left, top, right, bottom = line.box
        middle = (top + bottom) / 2
        edges = tuple(there(x, middle)[0] for x in line.edges)
        corners = [there(x, y) for x in (left, right) for y in (top, bottom)]
        xs, ys = zip(*corners, strict=True)
        box = (min(xs), min(ys), max(xs), max(ys))
        is_there = min(box[:2]) >= 0 and box[2] <= width and box[3] <= height
        placed.append(replace(line, box=box, edges=edges, slope=sine / cosine) if is_there else None)
    return np.asarray(turned), placed


def _shaded(ink: Ink, chance: random.Random, numbers: np.random.Generator) -> Ink:
    """Shades of ink and paper, unevenness and grain."""
    paper, dark = chance.uniform(190, 255), chance.uniform(0, 110)
    page = paper - ink.astype(np.float32) * ((paper - dark) / 255)
    height, width = ink.shape
    slope = numbers.uniform(-12, 12, size=2)
    page += np.linspace(-slope[0], slope[0], height, dtype=np.float32)[:, None]
    page += np.linspace(-slope[1], slope[1], width, dtype=np.float32)[None]
    if grain := chance.choice((0.0, 0.0, 3.0, 8.0)):
        page += _tiled(numbers.standard_normal((128, 128), dtype=np.float32) * grain, ink.shape)
    return page.clip(0, 255).astype(np.uint8)


def _speckle(page: Ink, chance: random.Random, numbers: np.random.Generator) -> None:
    """Dark and light specks of a pixel or two, and sometimes a streak down the page."""
    height, width = page.shape
    count = int(height * width * chance.uniform(1e-4, 1e-3))
    rows, cols = numbers.integers(0, height - 1, count), numbers.integers(0, width - 1, count)
    shades = numbers.choice(np.array([20, 60, 240], dtype=np.uint8), count)
    page[rows, cols] = shades
    page[rows[::2], cols[::2] + 1] = shades[::2]
    if chance.random() < 0.3:
        column = chance.randrange(width - 2)
        page[:, column : column + 2] = page[:, column : column + 2] // 2 + chance.choice((20, 120))


def _tiled(tile: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    times = [side // length + 1 for side, length in zip(shape, tile.shape, strict=True)]
    return np.tile(tile, times)[: shape[0], : shape[1]]


def _recompressed(image: Image.Image, quality: int) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return Image.open(stored)
