"""COCO files: images with boxes and masks around what is on them, as people have them.

Lin et al., arXiv 1405.0312: `images`, `annotations` and `categories`, lists of objects with an `id`. Boxes
are [left, top, width, height] in the pixels that an image file stores; `open_image` turns an image by its
Exif orientation, and here its boxes and masks are turned with it. Where the size of an image that lies on its
side is told upright, boxes are taken to be upright, in its whole file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from stepwell.data.files import is_there, path_of, read_json
from stepwell.data.masks import mask_box
from stepwell.data.objects import AnnotatedImage, Annotation, StoredMask, words
from stepwell.folders import one_line
from stepwell.images.limits import DEFAULT_LIMITS, NO_LIMITS, ImageLimits
from stepwell.images.open import is_ambiguous, stored_size
from stepwell.structures import Box, Size

__all__ = ["CocoFile", "turned_box"]

_TRIED = 100  # image names, with which the folder that they start from is looked for


class _Entry(NamedTuple):
    path: Path
    size: Size  # of the pixels in which boxes are told
    annotations: list[Annotation]
    fields: Mapping[str, Any]


class CocoFile:
    """A source of the images of one file, those without annotations among them.

    categories: id -> name, by id; `classes` are the names and `category_ids` the ids in that order. faults:
    what of the file makes no sense, each where it is and what is wrong; it is left out. A box that reaches
    past its image is cut at its edge; an annotation with a mask and no box has the mask's. Raises ValueError,
    at once, for what is no COCO file, and ImportError for compressed masks where faster-coco-eval, which
    reads them, is missing; at an index, for an image that is not there, or not of the size that the file
    says.
    """

    limits: ImageLimits = DEFAULT_LIMITS
    """Of image files."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        """images: the folder that file names start from; by default that which holds most of the first, of
        those where people keep their images: around the file, and in `images` and folders of the file's name.
        """
        self.path = path
        file = read_json(path)
        if not isinstance(file, Mapping) or not isinstance(file.get("images"), list):
            raise ValueError(f"{path} is no COCO file: it has no list of images")
        if images is not None and not images.is_dir():
            raise FileNotFoundError(2, "no such folder", str(images))
        self.images = _folder(path, file["images"]) if images is None else images
        self.faults: list[tuple[str, str]] = []
        self.categories = self._categories(file)
        self.classes, self.category_ids = tuple(self.categories.values()), tuple(self.categories)
        self._labels = {category: label for label, category in enumerate(self.category_ids)}
        self._by_id: dict[Any, _Entry] = {}
        for what, entry in self._objects(file, "images"):
            with self._noting(what):
                if _id(entry) in self._by_id:
                    raise ValueError("another image has the same id")
                image = _path(entry, self.images)
                self._by_id[_id(entry)] = _Entry(image, _size(entry, image), [], entry)
        for what, entry in self._objects(file, "annotations"):
            with self._noting(what):
                self._add(entry)
        self.entries = list(self._by_id.values())

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_masks(self) -> bool:
        """Whether every object has one, and there is an object. Looks at no image."""
        masks = [each.mask is not None for entry in self.entries for each in entry.annotations]
        return bool(masks) and all(masks)

    @property
    def num_objects(self) -> int:
        """Crowds too."""
        return sum(len(entry.annotations) for entry in self.entries)

    def where(self, index: int) -> str:
        entry = self.entries[index]
        return f"{self.path}, image {entry.path.name} (id {_short(_id(entry.fields))})"

    def __getitem__(self, index: int) -> AnnotatedImage:
        entry = self.entries[index]
        stored, orientation = stored_size(entry.path, limits=self.limits)
        upright = (stored[1], stored[0]) if orientation >= 5 else stored
        annotations = tuple(entry.annotations)
        if entry.size == stored and not (is_ambiguous(stored, orientation) and self._is_upright):
            annotations = tuple(_turned(each, stored, orientation) for each in annotations)
        elif entry.size != upright:  # where people measured what they saw
            raise ValueError(
                f"the file says {words(entry.size)} pixels, and {entry.path} has {words(stored)}"
            )
        return AnnotatedImage(path=entry.path, size=upright, annotations=annotations, fields=entry.fields)

    @cached_property
    def _is_upright(self) -> bool:
        """Whether the file tells what is seen, not what is stored: by its images that tell these apart."""
        for entry in self.entries:
            with suppress(ValueError, OSError):
                stored, orientation = stored_size(entry.path, limits=NO_LIMITS)
                if orientation != 1 and not is_ambiguous(stored, orientation):
                    return entry.size != stored
        return False

    def _categories(self, file: Mapping[str, Any]) -> dict[Any, str]:
        categories: dict[Any, str] = {}
        for what, entry in self._objects(file, "categories"):
            with self._noting(what):
                if _id(entry) in categories:
                    raise ValueError("another category has the same id")
                categories[_id(entry)] = str(entry.get("name", _id(entry)))
        return dict(sorted(categories.items(), key=lambda item: (isinstance(item[0], str), item[0])))

    def _objects(self, file: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The objects of one of the file's lists, and what to call each."""
        entries = file.get(name) or []
        if not isinstance(entries, list):
            raise ValueError(f"{self.path} is no COCO file: its {name} are no list")
        for number, entry in enumerate(entries):
            if isinstance(entry, Mapping):
                named = isinstance(entry.get("id"), int | str)
                yield f"{name}[{number}]" + (f", id {_short(entry['id'])}" if named else ""), entry
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
        of_image = fields.get("image_id")
        entry = None if isinstance(of_image, list | Mapping) else self._by_id.get(of_image)
        if entry is None:
            raise ValueError(f"its image_id {of_image!r} is of no image")
        category = fields.get("category_id")
        label = None if category is None else self._labels.get(category)
        if category is not None and self.categories and label is None:
            raise ValueError(f"its category_id {category!r} is of no category")
        bbox, segmentation = fields.get("bbox"), fields.get("segmentation")
        if segmentation == [[]]:  # as some write that there is none
            segmentation = None
        mask = box = None
        if segmentation:
            box = _within(mask_box(segmentation, entry.size), entry.size, "its segmentation")
            mask = StoredMask(segmentation=segmentation, size=entry.size)
        if bbox or box is None:
            box = _within(_corners(bbox), entry.size, f"its bbox {bbox}")
        area = fields.get("area")
        if area is not None and not (_is_number(area) and area >= 0):
            raise ValueError(f"its area is {area!r}")
        annotation = Annotation(
            box=box,
            category=category,
            label=label,
            is_crowd=_is_crowd(fields.get("iscrowd")),
            mask=mask,
            fields=fields,
        )
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


def _turned(annotation: Annotation, stored: Size, orientation: int) -> Annotation:
    mask = annotation.mask
    return replace(
        annotation,
        box=turned_box(annotation.box, stored, orientation),
        mask=None if mask is None else replace(mask, orientation=orientation),
    )


def _folder(path: Path, entries: Iterable[Any]) -> Path:
    """That of the images of a file. Raises ValueError where they are in none of those that are looked at."""
    here, above, names = path.parent, path.parent.parent, (path.stem, path.stem.rpartition("_")[2])
    folders = [here, here / "images", *(here / name for name in names)]
    folders += [above, above / "images", *(above / "images" / name for name in names)]
    folders += [above / name for name in names]
    told = [entry.get("file_name") for entry in islice(entries, _TRIED) if isinstance(entry, Mapping)]
    files = [name for name in told if isinstance(name, str) and name]
    if not files:
        return here
    held = [sum(is_there(folder, name) for name in files) for folder in folders]
    if any(held):
        return folders[held.index(max(held))]
    raise ValueError(
        f"no image of {path} is in {here} or {above}, or their folders images, {path.stem} and "
        f"images/{path.stem}, such as {files[0]}; name the folder that file names start from as images"
    )


def _id(entry: Mapping[str, Any]) -> Any:
    if entry.get("id") is None or isinstance(entry["id"], list | Mapping):
        raise ValueError(f"its id is {entry.get('id')!r}")
    return entry["id"]


def _short(value: Any) -> str:
    return repr(value)[:40]


def _path(entry: Mapping[str, Any], images: Path) -> Path:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"its file_name is {name!r}")
    return path_of(images, name)


def _size(entry: Mapping[str, Any], path: Path) -> Size:
    """(height, width) as the file says, or as the image has it."""
    height, width = entry.get("height"), entry.get("width")
    if height is None or width is None:
        return stored_size(path, limits=NO_LIMITS)[0]  # its pixels are held to those of the source
    if not (_is_number(height) and _is_number(width) and height >= 1 and width >= 1):
        raise ValueError(f"its width and height are {width!r} and {height!r}")
    return int(height), int(width)


def _corners(corner_and_size: Any) -> Box:
    """[left, top, width, height] -> xyxy."""
    numbers = corner_and_size if isinstance(corner_and_size, list) else []
    if len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise ValueError(f"its bbox is {corner_and_size!r}, not [left, top, width, height]")
    left, top, width, height = map(float, numbers)
    return left, top, left + width, top + height


def _within(box: Box, size: Size, what: str) -> Box:
    """A box, cut at the edges of its image. Raises ValueError where nothing is left."""
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        raise ValueError(f"{what} has no {'width' if right <= left else 'height'}")
    cut = max(left, 0.0), max(top, 0.0), min(right, float(size[1])), min(bottom, float(size[0]))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise ValueError(f"{what} lies outside of {words(size)} pixels")
    return cut


def _is_crowd(value: Any) -> bool:
    """0 or 1, which some write as text."""
    if value in (None, 0, 1, "0", "1"):
        return value in (1, "1")
    raise ValueError(f"its iscrowd is {value!r}, not 0 or 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
