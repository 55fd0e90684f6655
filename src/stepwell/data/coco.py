"""COCO files: images with boxes around what is on them, as people have them.

Lin et al., arXiv 1405.0312: `images`, `annotations` and `categories`, lists of objects with an `id`. Boxes
are [left, top, width, height] in the pixels that an image file stores; `open_image` turns an image by its
Exif orientation, and here its boxes are turned with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stepwell.data.files import path_of, read_json
from stepwell.folders import one_line
from stepwell.images.open import stored_size
from stepwell.structures import Box, Size

__all__ = ["Annotation", "CocoFile", "CocoImage", "turned_box"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """A box, xyxy, within its image, and what is in it."""

    box: Box
    category: Any  # the id of one of the file's categories, None where the annotation names none
    is_crowd: bool  # of many things, which nobody is asked to tell apart
    fields: Mapping[str, Any]  # as the file has them


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoImage:
    """An image, boxes in the pixels of the upright one, whose (height, width) is `size`."""

    path: Path
    size: Size
    annotations: tuple[Annotation, ...]
    fields: Mapping[str, Any]  # as the file has them


class _Entry(NamedTuple):
    path: Path
    size: Size  # of the pixels in which boxes are told
    annotations: list[Annotation]
    fields: Mapping[str, Any]


class CocoFile:
    """A source of the images of one file, those without annotations among them.

    categories: id -> name. faults: what of the file makes no sense, each where it is and what is wrong; it is
    left out. A box that reaches past its image is cut at its edge. Raises ValueError, at once, for what is
    no COCO file; at an index, for an image that is not there, or not of the size that the file says.
    """

    def __init__(self, path: Path, *, images: Path) -> None:
        """images: the folder that file names start from."""
        self.path, self.images = path, images
        file = read_json(path)
        if not isinstance(file, Mapping) or not isinstance(file.get("images"), list):
            raise ValueError(f"{path} is no COCO file: it has no list of images")
        self.faults: list[tuple[str, str]] = []
        self.categories: dict[Any, str] = {}
        for what, entry in self._objects(file, "categories"):
            with self._noting(what):
                self.categories[_id(entry)] = str(entry.get("name", _id(entry)))
        self._by_id: dict[Any, _Entry] = {}
        for what, entry in self._objects(file, "images"):
            with self._noting(what):
                if _id(entry) in self._by_id:
                    raise ValueError("another image has the same id")
                image = _path(entry, images)
                self._by_id[_id(entry)] = _Entry(image, _size(entry, image), [], entry)
        for what, entry in self._objects(file, "annotations"):
            with self._noting(what):
                self._add(entry)
        self.entries = list(self._by_id.values())

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, index: int) -> str:
        return f"{self.path}, image {self.entries[index].path.name}"

    def __getitem__(self, index: int) -> CocoImage:
        entry = self.entries[index]
        stored, orientation = stored_size(entry.path)
        upright = (stored[1], stored[0]) if orientation >= 5 else stored
        annotations = tuple(entry.annotations)
        if entry.size == stored:
            annotations = tuple(
                replace(each, box=turned_box(each.box, stored, orientation)) for each in annotations
            )
        elif entry.size != upright:  # where people measured what they saw
            raise ValueError(
                f"the file says {_words(entry.size)} pixels, and {entry.path} has {_words(stored)}"
            )
        return CocoImage(path=entry.path, size=upright, annotations=annotations, fields=entry.fields)

    def _objects(self, file: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The objects of one of the file's lists, and what to call each."""
        entries = file.get(name) or []
        if not isinstance(entries, list):
            raise ValueError(f"{self.path} is no COCO file: its {name} are no list")
        for number, entry in enumerate(entries):
            if isinstance(entry, Mapping):
                yield f"{name}[{number}]", entry
            else:
                reason = f"it is a {type(entry).__name__}, not an object"
                self.faults.append((f"{self.path}, {name}[{number}]", reason))

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, OSError, OverflowError) as error:
            self.faults.append((f"{self.path}, {what}", one_line(error)))

    def _add(self, fields: Mapping[str, Any]) -> None:
        entry = self._by_id.get(fields.get("image_id"))
        if entry is None:
            raise ValueError(f"its image_id {fields.get('image_id')!r} is of no image")
        category = fields.get("category_id")
        if category is not None and self.categories and category not in self.categories:
            raise ValueError(f"its category_id {category!r} is of no category")
        box = _box(fields.get("bbox"), entry.size)
        is_crowd = bool(fields.get("iscrowd"))
        annotation = Annotation(box=box, category=category, is_crowd=is_crowd, fields=fields)
        entry.annotations.append(annotation)


def turned_box(box: Box, stored: Size, orientation: int) -> Box:
    """A box in an image of `stored` (height, width) pixels -> in the image turned by an Exif orientation."""
    left, top, right, bottom = box
    height, width = stored
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def _id(entry: Mapping[str, Any]) -> Any:
    if entry.get("id") is None or isinstance(entry["id"], list | Mapping):
        raise ValueError(f"its id is {entry.get('id')!r}")
    return entry["id"]


def _path(entry: Mapping[str, Any], images: Path) -> Path:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"its file_name is {name!r}")
    return path_of(images, name)


def _size(entry: Mapping[str, Any], path: Path) -> Size:
    """(height, width) as the file says, or as the image has it."""
    height, width = entry.get("height"), entry.get("width")
    if height is None or width is None:
        return stored_size(path)[0]
    if not (_is_number(height) and _is_number(width) and height >= 1 and width >= 1):
        raise ValueError(f"its width and height are {width!r} and {height!r}")
    return int(height), int(width)


def _box(corner_and_size: Any, size: Size) -> Box:
    """[left, top, width, height] -> xyxy within the image."""
    numbers = corner_and_size if isinstance(corner_and_size, list) else []
    if len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise ValueError(f"its bbox is {corner_and_size!r}, not [left, top, width, height]")
    left, top, width, height = map(float, numbers)
    if width <= 0 or height <= 0:
        raise ValueError(f"its bbox {corner_and_size} has no {'width' if width <= 0 else 'height'}")
    box = max(left, 0.0), max(top, 0.0), min(left + width, float(size[1])), min(top + height, float(size[0]))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"its bbox {corner_and_size} lies outside of {_words(size)} pixels")
    return box


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
