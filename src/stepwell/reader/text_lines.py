"""Scanned pages with transcribed lines: windows of them at changing scale, asked like drawn pages.

Lines come from a COCO file whose annotations carry `text`, key fields from a JSONL file with `image` and
`fields`. Wide white margins are cut; a window is a page's whole text or a part of it at a readable scale.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, ImageEnhance

from stepwell.data.coco import CocoFile
from stepwell.data.files import read_list
from stepwell.data.objects import Annotation
from stepwell.folders import one_line
from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.images.open import open_image
from stepwell.reader.page import Line, PageSample
from stepwell.reader.questions import asked_closely, turns_about
from stepwell.structures import Box

__all__ = ["TextLines", "even_line"]

_COPIES = 100  # windows of every page
_KEPT_SIDE = 2000  # pages are kept in memory at most this large
_LEAST_CLOSE = 14.0  # pixels that a line looked at closely keeps of its height


class TextLines:
    """A source of many windows of every page. faults: what of the COCO file is left out, and why."""

    def __init__(
        self,
        path: Path,
        *,
        images: Path,
        fields: Path | None = None,
        reads: int = 16,
        long_side: int = 1024,
        whole: float = 0.5,
        close: float = 0.0,
        text: tuple[float, float] = (13.0, 26.0),
        seed: int = 0,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        """images: the folder that the file names start from; whole: share of windows that show all of a
        page's text; close: share of windows in which one line is looked at closely; text: range of the median
        line height in the other windows, in pixels; long_side: of those, at most.
        """
        self.file = CocoFile(path, images=images)
        self.file.limits = limits
        self.faults = [*self.file.faults]
        self.pages: list[int] = []  # numbers of images that have text
        for number, entry in enumerate(self.file.entries):
            if any(map(_text, entry.annotations)):
                self.pages.append(number)
            for place, annotation in enumerate(entry.annotations):
                if not isinstance(annotation.fields.get("text"), str) and not annotation.is_crowd:
                    what = f"annotation {annotation.fields.get('id', f'without id ({place} of its image)')}"
                    self.faults.append((f"{self.file.where(number)}, {what}", "its text is no text"))
        if not self.pages:
            raise ValueError(f"{path} has no annotation with a text")
        self.fields = _read_fields(fields)
        self.reads, self.long_side, self.whole, self.close = reads, long_side, whole, close
        self.text, self.seed = text, seed

    def __len__(self) -> int:
        return len(self.pages) * _COPIES

    def path_of(self, number: int) -> Path:
        """The file of an entry."""
        return self.file[number].path

    def lines_of(self, number: int) -> list[Line]:
        """Of an entry, in pixels of its file."""
        annotations = self.file[number].annotations
        return [even_line(text.upper(), each.box) for each in annotations if (text := _text(each))]

    def where(self, index: int) -> str:
        return f"{self.file.where(self.pages[index % len(self.pages)])}, window {index // len(self.pages)}"

    def __getitem__(self, index: int) -> PageSample:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        chance = random.Random(f"{self.seed}/{index}")
        number = self.pages[index % len(self.pages)]
        known = self.lines_of(number)
        texts, boxes = [line.text for line in known], [line.box for line in known]
        page, shift, scale = _page(self.path_of(number), _union(boxes), self.file.limits)
        boxes = [_moved(box, shift, (scale, scale)) for box in boxes]
        stretch = chance.uniform(0.9, 1.1), chance.uniform(0.9, 1.1)
        shown = chance.randrange(len(boxes)) if chance.random() < self.close else None
        if shown is None:
            window = self._window(boxes, page.size, chance)
            zoom = self._zoom(window, boxes, chance)
        else:
            window = self._window_around(boxes[shown], boxes, page.size, chance)
            zoom = chance.uniform(min(1.0, _LEAST_CLOSE / (boxes[shown][3] - boxes[shown][1])), 1.0)
        width, height = (
            max(32, round(side * zoom * more)) for side, more in zip(_sides(window), stretch, strict=True)
        )
        image = page.resize((width, height), Image.Resampling.BILINEAR, box=window)
        image = ImageEnhance.Contrast(image).enhance(chance.uniform(0.7, 1.2))
        image = ImageEnhance.Brightness(image).enhance(chance.uniform(0.8, 1.15))
        scales = width / (window[2] - window[0]), height / (window[3] - window[1])
        if shown is not None:
            line = even_line(texts[shown], _moved(boxes[shown], window[:2], scales))
            messages, region = asked_closely(line, (height, width), chance)
            return PageSample(
                images=(image.convert("RGB"),),
                messages=messages,
                regions=(region,),
                spelled=(line,),
                lines=(line,),
            )
        lines = []
        for text, box in zip(texts, boxes, strict=True):
            if _inside(box, window):
                lines.append(even_line(text, _moved(box, window[:2], scales)))
        seen = " ".join(line.text for line in lines)
        fields = {
            key: value.upper()
            for key, value in self.fields.get(self.file[number].fields["file_name"], {}).items()
            if all(word in seen for word in value.upper().split())
        }
        messages, spelled = turns_about(lines, fields, (height, width), reads=self.reads, chance=chance)
        return PageSample(
            images=(image.convert("RGB"),), messages=messages, spelled=spelled, lines=tuple(lines)
        )

    def _window(self, boxes: list[Box], size: tuple[int, int], chance: random.Random) -> Box:
        """All text with a margin, or a part of it around one line."""
        text = _union(boxes)
        left, top, right, bottom = _with_margins(text, 0.06 * max(_sides(text)), size, chance)
        if chance.random() < self.whole:
            return left, top, right, bottom
        largest = self.long_side * median(box[3] - box[1] for box in boxes) / chance.uniform(*self.text)
        width, height = min(right - left, largest), min(bottom - top, largest * chance.uniform(0.6, 1.0))
        centre = chance.choice(boxes)
        left = min(max(left, centre[0] - chance.uniform(0, 0.3) * width), right - width)
        top = min(max(top, (centre[1] + centre[3] - height) / 2), bottom - height)
        return left, top, left + width, top + height

    def _window_around(self, box: Box, boxes: list[Box], size: tuple[int, int], chance: random.Random) -> Box:
        """All text, or one line with what lies near it."""
        whole = chance.random() < self.whole
        text = _union(boxes) if whole else box
        return _with_margins(text, 0.06 * max(_sides(text)) if whole else 4 * (box[3] - box[1]), size, chance)

    def _zoom(self, window: Box, boxes: list[Box], chance: random.Random) -> float:
        largest = self.long_side / max(_sides(window)) / 1.1
        typical = median(box[3] - box[1] for box in boxes)
        return min(largest, chance.uniform(*self.text) / typical) if chance.random() < 0.5 else largest


@lru_cache(maxsize=512)
def _page(path: Path, text: Box, limits: ImageLimits) -> tuple[Image.Image, tuple[float, float], float]:
    """-> a page in grey, cut around its text; the cut's (left, top) in the file's pixels; the scale kept."""
    image = open_image(path, limits=limits).convert("L")
    margin = 0.08 * max(text[2] - text[0], text[3] - text[1])
    left, top = max(0, int(text[0] - margin)), max(0, int(text[1] - margin))
    right, bottom = min(image.width, int(text[2] + margin)), min(image.height, int(text[3] + margin))
    image = image.crop((left, top, right, bottom))
    scale = min(1.0, _KEPT_SIDE / max(image.size))
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    return image, (float(left), float(top)), scale


def _read_fields(path: Path | None) -> dict[str, dict[str, str]]:
    """Of each image. Raises ValueError naming the file and the line that is something else."""
    fields: dict[str, dict[str, str]] = {}
    lines: Any = () if path is None else read_list(path)
    for number in range(len(lines)):
        try:
            entry = lines[number]
            known = ((key, value) for key, value in entry["fields"].items() if value is not None)
            fields[entry["image"]] = {key: str(value) for key, value in known if str(value).strip()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, entry {number} has no image and fields ({one_line(error)})") from None
    return fields


def _text(annotation: Annotation) -> str:
    """Of a line; nothing for a crowd, which is many."""
    text = annotation.fields.get("text")
    return "" if annotation.is_crowd or not isinstance(text, str) else text.strip()


def even_line(text: str, box: Box) -> Line:
    """A line whose characters are taken to be equally wide."""
    step = (box[2] - box[0]) / len(text)
    return Line(text=text, box=box, edges=tuple(box[0] + step * i for i in range(len(text) + 1)), exact=False)


def _union(boxes: list[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _with_margins(box: Box, most: float, size: tuple[int, int], chance: random.Random) -> Box:
    """The box and up to so many pixels on every side, within a page of size (width, height)."""
    left, top, right, bottom = (chance.uniform(0, most) for _ in range(4))
    return (
        max(0.0, box[0] - left),
        max(0.0, box[1] - top),
        min(float(size[0]), box[2] + right),
        min(float(size[1]), box[3] + bottom),
    )


def _sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def _moved(box: Box, origin: tuple[float, ...], scales: tuple[float, float]) -> Box:
    (x, y), (across, down) = origin, scales
    return (box[0] - x) * across, (box[1] - y) * down, (box[2] - x) * across, (box[3] - y) * down


def _inside(box: Box, window: Box) -> bool:
    slack = 0.15 * (box[3] - box[1])
    return (
        box[0] >= window[0] - slack
        and box[1] >= window[1] - slack
        and box[2] <= window[2] + slack
        and box[3] <= window[3] + slack
    )
