"""Folders of images: one for every class, which classifiers and probes learn from, or any, without labels.

The layout of the former is that of ImageNet's training part, as torchvision's ImageFolder reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepwell.data.files import path_of, read_text
from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits

__all__ = ["ENDINGS", "ImageFolder", "Images", "LabelledImage", "image_files", "images_below", "walk_images"]

ENDINGS = frozenset(".png .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .tif .tiff .avif .heic .heif".split())
"""Of images in a folder; a file that is named may have any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """An image, and the number of its class among the source's `classes`."""

    image: Path
    label: int


class ImageFolder:
    """A source of the images below the folders of classes, in the order of classes and file names.

    Images are told by the ends of their names, and hidden files and folders passed over. Raises ValueError
    for a folder without classes, for a class without a folder and for one without an image.
    """

    limits: ImageLimits = DEFAULT_LIMITS
    """Of image files."""

    def __init__(self, path: Path, *, classes: Sequence[str] | None = None) -> None:
        """classes: names of the folders, in the order of their numbers; by default all there are, in the
        order of their names. A folder that is none of them is an error.
        """
        folders = {
            entry.name: entry for entry in sorted(path.iterdir()) if _is_shown(entry.name) and entry.is_dir()
        }
        if not folders:
            raise ValueError(f"{path} has no folders; it should hold a folder of images for every class")
        self.path = path
        self.classes = tuple(folders if classes is None else classes)
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"a class is named twice: {', '.join(self.classes)}")
        if strange := sorted(folders.keys() ^ set(self.classes)):
            lacking = strange[0] in self.classes
            raise ValueError(
                f"{path} has no folder {strange[0]}" if lacking else f"{path / strange[0]} is of no class"
            )
        self.entries = [
            (image, label) for label, name in enumerate(self.classes) for image in image_files(folders[name])
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, index: int) -> str:
        return str(self.entries[index][0])

    def __getitem__(self, index: int) -> LabelledImage:
        image, label = self.entries[index]
        return LabelledImage(image=image, label=label)


class Images:
    """A source of images alone: those below a folder, or those that a text file lists, one a line."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        """images: the folder that the lines of a list start from, by default the list's own.

        Raises ValueError for a folder or a list without an image, FileNotFoundError for neither.
        """
        if path.is_dir():
            if images is not None:
                raise ValueError(f"{path} is a folder of images; {images} beside it would be ignored")
            self.files = image_files(path)
            return
        lines = (line.strip() for line in read_text(path).splitlines())
        self.files = [path_of(images or path.parent, line) for line in lines if line]
        if not self.files:
            raise ValueError(f"{path} lists no image")

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def __getitem__(self, index: int) -> Path:
        return self.files[index]


def image_files(folder: Path) -> list[Path]:
    """`images_below` a folder. Raises ValueError for none, FileNotFoundError where there is no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    images = images_below(folder)
    if not images:
        raise ValueError(f"{folder} holds no image")
    return images


def images_below(folder: Path) -> list[Path]:
    """However deep, in the order of their names, without hidden ones."""
    return [*map(Path, walk_images(str(folder)))]


def walk_images(folder: str) -> Iterator[str]:
    """`images_below` a folder one by one; no more is held than the names in one folder. Links to folders are
    not followed. Raises OSError for a folder that cannot be read, when its turn comes.
    """
    with os.scandir(folder) as entries:
        names = sorted(
            (entry.name, is_folder)
            for entry in entries
            if _is_shown(entry.name)
            and ((is_folder := entry.is_dir(follow_symlinks=False)) or _is_image(entry))
        )
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk_images(path)
        else:
            yield path


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in ENDINGS and entry.is_file()


def _is_shown(name: str) -> bool:
    return not name.startswith(".")
