"""YOLO data sets: a text file of boxes or polygons beside every image, and a YAML file with the classes.

The format is Ultralytics': a line is a class number, then centre x, centre y, width and height, or the x and
y of a polygon's points by turns, as fractions of the upright image. Of poses, whose YAML file has a
`kpt_shape`, the boxes are read. The labels of `images/a/b.jpg` are in `labels/a/b.txt`, those of an image
that is in no folder `images` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stepwell.data.files import is_there, path_of, read_text
from stepwell.data.image_folder import Images
from stepwell.data.masks import mask_box
from stepwell.data.objects import AnnotatedImage, Annotation, StoredMask
from stepwell.folders import one_line
from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.images.open import image_size
from stepwell.structures import Box, Size

__all__ = ["YoloFiles", "named_splits"]

_SLACK = 0.01  # by which rounding may carry a fraction past the image
_LISTS = ("classes.txt", "labels/classes.txt")
_WRONG_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


class _Line(NamedTuple):
    label: int
    box: Box  # xyxy, fractions of the image
    points: tuple[float, ...]  # of a polygon, fractions of the image, x and y by turns


class YoloFiles:
    """A source of the images of one split, those without a label file or a line in it among them.

    categories: class number -> name, by number; `classes` are the names, `category_ids` the numbers in that
    order. faults: lines that make no sense, and label files of no image; they are left out. What reaches past
    the image is cut at its edge. Raises ValueError, at once, for what is no such data set, and where no image
    has labels; at an index, for an image that cannot be read.
    """

    limits: ImageLimits = DEFAULT_LIMITS
    """Of image files."""

    def __init__(self, path: Path, *, split: str | None = None) -> None:
        """path: the YAML file or its folder, and the split, by default train, is one that it names; or a
        folder with `images`, `labels` and a classes.txt, and the split is a folder in the first two.
        """
        self.path = path
        settings = _settings(path)
        self.categories = _names(settings.get("names"), path)
        self.classes, self.category_ids = tuple(self.categories.values()), tuple(self.categories)
        self._labels = {number: label for label, number in enumerate(self.category_ids)}
        places = _places(path, settings, split)
        self.split = split or ("train" if settings.get("train") else None)
        self._is_pose = "kpt_shape" in settings
        self.files = [image for place in places for image in Images(place).files]
        self.faults: list[tuple[str, str]] = []
        texts = [_label_file(image) for image in self.files]
        if not any(is_there(text.parent, text.name) for text in texts):
            raise ValueError(f"no image of {path} has labels: there is no {texts[0]}, or any other")
        self.entries = [list(self._lines(text)) for text in texts]
        known = {*texts}
        for place in places:
            labels = _label_folder(place)
            if labels != place and place.is_dir():
                strange = [
                    text
                    for text in sorted(labels.rglob("*.txt"))
                    if text not in known and text.name != _LISTS[0]
                ]
                self.faults += [(str(text), "it is of no image") for text in strange]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def num_objects(self) -> int:
        return sum(map(len, self.entries))

    @property
    def has_masks(self) -> bool:
        """Whether every object has one, and there is an object. Looks at no image."""
        polygons = [bool(line.points) for lines in self.entries for line in lines]
        return bool(polygons) and all(polygons)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def __getitem__(self, index: int) -> AnnotatedImage:
        size = image_size(self.files[index], limits=self.limits)
        annotations = tuple(self._annotation(line, size) for line in self.entries[index])
        return AnnotatedImage(path=self.files[index], size=size, annotations=annotations, fields={})

    def _lines(self, path: Path) -> Iterator[_Line]:
        try:
            lines = read_text(path).splitlines() if is_there(path.parent, path.name) else []
        except (ValueError, OSError) as error:
            self.faults.append((str(path), one_line(error)))
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield self._line(line.split())
                except ValueError as error:
                    self.faults.append((f"{path}, line {number}", one_line(error)))

    def _line(self, words: list[str]) -> _Line:
        try:
            category, *numbers = map(float, words)
        except ValueError:
            raise ValueError("it holds what is no number") from None
        if category not in self._labels:
            raise ValueError(f"its class is {words[0]}, which is of no name")
        if self._is_pose:  # key points are behind the box
            numbers = numbers[:4]
        if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            raise ValueError(
                f"behind its class are {len(numbers)} numbers, not the 4 of a box (centre x, centre y, "
                "width, height) or x and y of three points or more"
            )
        if not all(-_SLACK <= number <= 1 + _SLACK for number in numbers):  # also where one is no number
            raise ValueError("its numbers are no fractions of the image, from 0 to 1")
        points: tuple[float, ...] = ()
        if len(numbers) == 4:
            x, y, width, height = numbers
            box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        else:
            points = tuple(min(max(number, 0.0), 1.0) for number in numbers)
            box = min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])
        left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in box)
        if left >= right or top >= bottom:
            raise ValueError(f"its {'polygon' if points else 'box'} has no area within the image")
        return _Line(self._labels[int(category)], (left, top, right, bottom), points)

    def _annotation(self, line: _Line, size: Size) -> Annotation:
        height, width = size
        left, top, right, bottom = line.box
        mask = None
        if line.points:
            polygon = [part * (height if i % 2 else width) for i, part in enumerate(line.points)]
            mask_box([polygon], size)  # refuses one that is too long to be drawn
            mask = StoredMask(segmentation=[polygon], size=size)
        return Annotation(
            box=(left * width, top * height, right * width, bottom * height),
            category=self.category_ids[line.label],
            label=line.label,
            mask=mask,
            fields={},
        )


def _settings(path: Path) -> Mapping[str, Any]:
    """Of the YAML file, or of the one in a folder; or only `names`, of a list of classes."""
    if path.is_file():
        return _read_yaml(path)
    if not path.is_dir():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if len(found) > 1:
        raise ValueError(f"{path} holds several YAML files; name one of them, such as {found[0]}")
    if found:
        return _read_yaml(found[0])
    for name in _LISTS:
        if (path / name).is_file():
            lines = [line.strip() for line in read_text(path / name).splitlines()]
            return {"names": [line for line in lines if line]}
    raise ValueError(f"{path} names no classes: put a name a line into {path / _LISTS[0]}")


class _Words(yaml.SafeLoader):
    """YAML in which yes, no, on and off are words, as in names of classes, and not truth."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        settings = yaml.load(read_text(path), _Words)
    except _WRONG_YAML as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path} is no YOLO data set: it must be a mapping with names, train and val")
    return settings


def _names(names: Any, path: Path) -> dict[int, str]:
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f"{path} is no YOLO data set: it has no names, a list or a mapping of class numbers")
    if not all(isinstance(number, int) and number >= 0 for number in names):
        raise ValueError(f"{path}: the names of classes have keys that are no numbers from 0 on")
    return {number: str(names[number]) for number in sorted(names)}


def _places(path: Path, settings: Mapping[str, Any], split: str | None) -> list[Path]:
    """The folders and lists of images that a split is made of."""
    told = settings.get(split or "train")
    if told is None and path.is_dir():
        place = path / "images" / (split or "")
        if not place.is_dir():
            raise ValueError(f"there is no folder {place}, of the images of {path}")
        return [place]
    told = [told] if isinstance(told, str) else told
    if not isinstance(told, list) or not told or not all(isinstance(place, str) for place in told):
        named = ", ".join(_named(settings)) or "none"
        raise ValueError(f"{path} has no split {split or 'train'}; it names images of {named}")
    folder = path if path.is_dir() else path.parent
    roots = (path_of(folder, str(settings.get("path") or "")), folder)
    return [_place(name, roots, path) for name in told]


def named_splits(path: Path) -> list[str]:
    """Those of train, val and test that a data set's YAML file names. Raises ValueError as YoloFiles does."""
    return _named(_settings(path))


def _named(settings: Mapping[str, Any]) -> list[str]:
    return [name for name in ("train", "val", "test") if settings.get(name)]


def _place(name: str, roots: Sequence[Path], path: Path) -> Path:
    """Below the data set's folder; or the YAML file's own, which it was moved with. Some write ../ in front,
    as Roboflow does, and mean neither.
    """
    shortened = name.removeprefix("../")
    for candidate in (path_of(root, each) for each in (name, shortened) for root in roots):
        try:
            if candidate.exists():
                return candidate
        except (OSError, ValueError):  # a name that no file can have
            continue
    raise ValueError(f"{path} names images in {name}, which is not in {roots[0]}")


def _label_file(image: Path) -> Path:
    text = _label_folder(image.parent) / f"{image.stem}.txt"
    beside = image.with_name(text.name)
    is_beside = is_there(beside.parent, beside.name) and not is_there(text.parent, text.name)
    return beside if is_beside else text


def _label_folder(folder: Path) -> Path:
    """Of the labels of a folder's images: `labels` where the path last says `images`, else the same."""
    parts = folder.parts
    if "images" not in parts:
        return folder
    place = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:place], "labels", *parts[place + 1 :])
