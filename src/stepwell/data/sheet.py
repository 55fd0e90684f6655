"""A sheet of a source's samples with boxes, masks or maps of labels in the colours of their classes, for
people to see what no check finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from stepwell.data.classes import ClassList, class_names
from stepwell.data.image_folder import LabelledImage
from stepwell.data.label_maps import IGNORED, LabelledPixels
from stepwell.data.objects import AnnotatedImage, Annotation
from stepwell.data.sample import BadSample, read
from stepwell.data.summary import LabelledSource, counted, short_name
from stepwell.images.draw import Colour, class_colours, ink_on, tint
from stepwell.images.open import open_image
from stepwell.language.characters import well_formed
from stepwell.structures import Size
from stepwell.views.panels import (
    CAPTION,
    MARGIN,
    SHEET_WIDTH,
    in_rows,
    side_by_side,
    stack,
    text_width,
    write_text,
)

__all__ = ["SamplePainter", "Sheet", "captioned", "draw_samples", "thumbnail"]

PANEL_WIDTH = (SHEET_WIDTH - MARGIN) // 4 - MARGIN
PANEL_HEIGHT = 300
NAMED = 8  # boxes of a picture, up to which each is named; of more, those in which the name has room
LINE = CAPTION - 4  # height of a name
LISTED = 40  # classes under the sheet
SEARCHED = 1000  # samples that are tried at most, where many cannot be drawn
NO_CLASS: Colour = (128, 128, 128)


class Sheet(NamedTuple):
    """bad: samples that were to be drawn and cannot be read, each where it is and why."""

    image: Image.Image
    bad: tuple[tuple[str, str], ...]


class _Drawn(NamedTuple):
    panel: Image.Image
    labels: set[int]


def draw_samples(source: LabelledSource, *, samples: int = 16, seed: int = 0) -> Sheet:
    """Up to `samples` of a source, drawn by chance, in their order; the same for the same seed. Raises
    ValueError where none can be drawn.
    """
    draw = SamplePainter(source)
    drawn: dict[int, _Drawn] = {}
    bad = []
    order = np.random.default_rng(seed).permutation(len(source))[: max(samples, SEARCHED)]
    for index in order.tolist():
        result = read([source], 0, index, draw)
        if isinstance(result, BadSample):
            bad.append((result.where, result.reason))
        else:
            drawn[index] = result
        if len(drawn) == samples:
            break
    if not drawn:
        reason = f", {bad[0][0]}: {bad[0][1]}" if bad else ": there is none"
        raise ValueError(f"no sample can be drawn{reason}")
    panels = [drawn[index].panel for index in sorted(drawn)]
    labels = sorted(set().union(*(one.labels for one in drawn.values())))
    rows = [*in_rows(panels), *(in_rows(draw.legend(labels)) if labels else [])]
    return Sheet(_framed(stack([side_by_side(row) for row in rows])), tuple(bad))


class SamplePainter:
    """A sample -> its panel, and the labels on it that the legend should tell."""

    def __init__(self, source: LabelledSource) -> None:
        self.names = [short_name(name) for name in class_names(source.classes)]
        told = source.classes.colours if isinstance(source.classes, ClassList) else ()
        self.limits = source.limits
        self.colours: list[Colour] = [*told] or class_colours(len(self.names))

    def __call__(self, sample: Any) -> _Drawn:
        if isinstance(sample, AnnotatedImage):
            things = sample.annotations
            picture = self._objects(open_image(sample.path, limits=self.limits), things)
            named = {thing.label for thing in things if thing.label is not None}
            text = f"{sample.path.name}, {counted(len(things), 'object')}"
            return _Drawn(captioned(picture, text, sample.size), named)
        if isinstance(sample, LabelledPixels):
            picture = self._map(open_image(sample.image, limits=self.limits), sample.labels)
            height, width = sample.labels.shape
            named = set(np.flatnonzero(np.bincount(sample.labels.reshape(-1))).tolist()) - {IGNORED}
            return _Drawn(captioned(picture, sample.image.name, (height, width)), named)
        if isinstance(sample, LabelledImage):
            image = open_image(sample.image, limits=self.limits)
            size = (image.height, image.width)
            return _Drawn(captioned(thumbnail(image), self.names[sample.label], size), set())
        raise TypeError(f"a {type(sample).__name__} is no sample of detectors, segmenters or classifiers")

    def legend(self, labels: Sequence[int]) -> list[Image.Image]:
        """A patch of colour and a name for each class, and how many have none."""
        shown = labels[:LISTED]
        patches = [_patch(self.names[label], self.colours[label]) for label in shown]
        more = len(labels) - len(shown)
        return [*patches, _patch(f"and {more} more classes", (255, 255, 255))] if more else patches

    def _map(self, image: Image.Image, labels: np.ndarray[Any, np.dtype[np.int64]]) -> Image.Image:
        picture = thumbnail(image)
        table = np.zeros((IGNORED + 1, 3), dtype=np.uint8)
        table[: len(self.colours)] = self.colours
        small = _sampled(labels, picture)
        return _tinted(picture, small != IGNORED, table[small])

    def _objects(self, image: Image.Image, things: Sequence[Annotation]) -> Image.Image:
        picture = thumbnail(image)
        scale = picture.width / image.width, picture.height / image.height
        covered = np.zeros((picture.height, picture.width), dtype=bool)
        colours = np.zeros((*covered.shape, 3), dtype=np.uint8)
        for thing in things:
            if thing.mask is not None:
                mask = _sampled(thing.mask.pixels(), picture)
                covered |= mask
                colours[mask] = self._colour(thing)
        picture = _tinted(picture, covered, colours)
        boxes = [tuple(np.multiply(thing.box, scale * 2).tolist()) for thing in things]
        pen = ImageDraw.Draw(picture)
        for thing, (left, top, right, bottom) in zip(things, boxes, strict=True):
            corner = max(right - 1, left), max(bottom - 1, top)
            pen.rectangle((left, top, *corner), outline=self._colour(thing), width=1)
        for thing, (left, top, right, _) in zip(things, boxes, strict=True):
            width = text_width(self._name(thing))
            if len(things) <= NAMED or width <= right - left:
                place = (int(min(left, max(picture.width - width, 0))), int(max(top - LINE, 0)))
                picture.paste(self._colour(thing), (*place, place[0] + width, place[1] + LINE))
                write_text(picture, place, self._name(thing), ink_on(self._colour(thing)))
        return picture

    def _colour(self, thing: Annotation) -> Colour:
        return NO_CLASS if thing.label is None else self.colours[thing.label]

    def _name(self, thing: Annotation) -> str:
        name = "no category" if thing.label is None else self.names[thing.label]
        return f"{name} (crowd)" if thing.is_crowd else name


def thumbnail(image: Image.Image) -> Image.Image:
    """As large as a panel allows, its aspect kept."""
    scale = min(PANEL_WIDTH / image.width, PANEL_HEIGHT / image.height)
    width, height = (max(round(side * scale), 1) for side in image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return image.resize((width, height), resample, reducing_gap=2.0)


def _sampled(pixels: np.ndarray[Any, Any], picture: Image.Image) -> np.ndarray[Any, Any]:
    """(H, W) of an image -> (h, w) of its thumbnail, whose pixels lie in the middle of what they show."""
    height, width = pixels.shape
    rows = ((np.arange(picture.height) + 0.5) * height / picture.height).astype(np.int64)
    cols = ((np.arange(picture.width) + 0.5) * width / picture.width).astype(np.int64)
    sampled: np.ndarray[Any, Any] = pixels[rows[:, None], cols]
    return sampled


def _tinted(
    picture: Image.Image, mask: np.ndarray[Any, Any], colours: np.ndarray[Any, np.dtype[np.uint8]]
) -> Image.Image:
    """With colours (h, w, 3) laid over it where the mask (h, w) is."""
    pixels = np.array(picture)
    tint(pixels, mask, colours)
    return Image.fromarray(pixels)


def captioned(picture: Image.Image, text: str, size: Size) -> Image.Image:
    """A panel with a line of text over a picture, which is a thumbnail of (height, width) `size`."""
    panel = Image.new("RGB", (PANEL_WIDTH, picture.height + CAPTION), "white")
    panel.paste(picture, (0, CAPTION))
    write_text(panel, (0, 2), _fitted(text, f", {size[1]} x {size[0]}"), "black")
    return panel


def _fitted(text: str, end: str) -> str:
    """A line of a panel's width: as much of a text as it has room for, and an end."""
    line = well_formed(" ".join(text.split()))
    room = PANEL_WIDTH - text_width(end)
    if text_width(line) <= room:
        return line + end
    while line and text_width(f"{line}...") > room:
        line = line[:-1]
    return f"{line}...{end}"


def _patch(name: str, colour: Colour) -> Image.Image:
    patch = Image.new("RGB", (CAPTION + text_width(name), CAPTION), "white")
    patch.paste(colour, (0, 4, 14, 18))
    write_text(patch, (CAPTION, 2), name, "black")
    return patch


def _framed(sheet: Image.Image) -> Image.Image:
    """With a margin at the top, which rows of panels have nowhere else."""
    framed = Image.new("RGB", (sheet.width, sheet.height + MARGIN), "white")
    framed.paste(sheet, (0, MARGIN))
    return framed
