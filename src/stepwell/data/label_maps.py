"""Images with a map of the class of every pixel: what segmenters learn from.

A map is an image file of as many pixels, which is turned with its image: of class numbers, in one channel or
behind a palette, or of colours that a list of classes tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.data.classes import ClassList, read_classes
from stepwell.data.files import is_there, path_of, place_of, read_list
from stepwell.data.image_folder import image_files
from stepwell.folders import one_line
from stepwell.images.label_map import open_label_map, turned
from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.images.open import is_ambiguous, stored_size

__all__ = ["IGNORED", "LabelMaps", "LabelledPixels", "ListedLabelMaps"]

IGNORED = 255
"""The label of a pixel that belongs to no class, as transformers' segmenters take it."""

Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPixels:
    """image: where it is. labels: (H, W) of the upright image, places in the list of classes, or IGNORED."""

    image: Path
    labels: Labels


class LabelMaps:
    """A source of images and their maps, which are files of one name in two folders.

    faults: images without a map, maps without an image, and files of one name, of which the first is taken;
    they are left out. Raises ValueError, at once, for folders without a pair, for an image that would be its
    own map, and for more than 255 classes; at an index, for a map of another size than its image's, and for
    one that holds what is none of the classes.
    """

    limits: ImageLimits = DEFAULT_LIMITS
    """Of the files of images and of maps."""

    def __init__(
        self,
        images: Path,
        labels: Path,
        *,
        classes: ClassList | Path | Sequence[str],
        image_ending: str = "",
        label_ending: str = "",
    ) -> None:
        """classes: names in the order of their numbers, or a file (`read_classes`). image_ending,
        label_ending: what the names of one kind end in, such as "_leftImg8bit" and "_gtFine_labelIds".
        """
        self.classes = _class_list(classes)
        self.faults: list[tuple[str, str]] = []
        of_images, of_labels = self._by_name(images, image_ending), self._by_name(labels, label_ending)
        self.entries = [(of_images[name], of_labels[name]) for name in of_images if name in of_labels]
        if itself := [image for image, label in self.entries if image == label]:
            raise ValueError(
                f"{itself[0]} would be its own map: images and maps are in one folder, so tell them by "
                "image_ending or label_ending, or put them in two folders"
            )
        self.faults += [
            *((str(path), "it has no map") for name, path in of_images.items() if name not in of_labels),
            *((str(path), "it is of no image") for name, path in of_labels.items() if name not in of_images),
        ]
        if not self.entries:
            raise ValueError(f"no image in {images} has a map of its name in {labels}")

    def _by_name(self, folder: Path, ending: str) -> Mapping[str, Path]:
        """Image files by their names below a folder, without the ending."""
        files: dict[str, Path] = {}
        for path in image_files(folder):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if not name.endswith(ending):
                continue
            first = files.setdefault(name.removesuffix(ending), path)
            if first != path:
                self.faults.append((str(path), f"{first.name} has its name, by which images find their maps"))
        return files

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, index: int) -> str:
        return str(self.entries[index][0])

    def __getitem__(self, index: int) -> LabelledPixels:
        image, path = self.entries[index]
        try:
            labels = self.classes.labels(open_label_map(path, limits=self.limits), ignored=IGNORED)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        stored, orientation = stored_size(image, limits=self.limits)
        upright = (stored[1], stored[0]) if orientation >= 5 else stored
        if labels.shape == stored and not (is_ambiguous(stored, orientation) and self._is_upright):
            labels = turned(labels, orientation)
        elif labels.shape != upright:
            height, width = labels.shape
            raise ValueError(f"{path} has {width} x {height} pixels, its image {stored[1]} x {stored[0]}")
        return LabelledPixels(image=image, labels=labels)

    @cached_property
    def _is_upright(self) -> bool:
        """Whether maps are of what is seen, and not of what is stored: by pairs that tell these apart."""
        for image, path in self.entries:
            with suppress(ValueError, OSError):
                stored, orientation = stored_size(image, limits=self.limits)
                if orientation != 1 and not is_ambiguous(stored, orientation):
                    return stored_size(path, limits=self.limits)[0] != stored
        return False


class ListedLabelMaps(LabelMaps):
    """The same of pairs that a file lists: JSON objects with an `image` and a `label`, in a list or a line
    each, told from the file's folder on.

    faults: entries that are something else, or whose files are not there. Raises ValueError, at once, for a
    list without a pair.
    """

    def __init__(self, path: Path, *, classes: ClassList | Path | Sequence[str]) -> None:
        self.path = path
        self.classes = _class_list(classes)
        self.entries = []
        self.faults = []
        listed = read_list(path)
        for number in range(len(listed)):
            try:
                self.entries.append(_pair(listed[number], path.parent))
            except ValueError as error:
                self.faults.append((f"{path}, {place_of(listed, number)}", one_line(error)))
        if not self.entries:
            reason = f": {self.faults[0][1]}" if self.faults else ""
            raise ValueError(f"{path} lists no image with its map of labels{reason}")

    def where(self, index: int) -> str:
        return f"{self.path}, {self.entries[index][0]}"


def _class_list(classes: ClassList | Path | Sequence[str]) -> ClassList:
    if not isinstance(classes, ClassList):
        classes = read_classes(classes) if isinstance(classes, Path) else ClassList(names=tuple(classes))
    if len(classes.names) > IGNORED:
        raise ValueError(f"labels have room for {IGNORED} classes, got {len(classes.names)}")
    return classes


def _pair(entry: Any, folder: Path) -> tuple[Path, Path]:
    told = [entry.get(key) for key in ("image", "label")] if isinstance(entry, Mapping) else []
    names = [name for name in told if isinstance(name, str) and name]
    if len(names) < 2:
        raise ValueError('it is no object of the form {"image": "a.jpg", "label": "a.png"}')
    if lacking := [name for name in names if not is_there(folder, name)]:
        raise ValueError(f"there is no file {folder / lacking[0]}")
    return path_of(folder, names[0]), path_of(folder, names[1])
