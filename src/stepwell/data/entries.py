"""Entries of the data of perception recipes, each of a `kind`; and which of them a path is.

Detectors take COCO files and YOLO data sets, segmenters images with maps of labels, classifiers folders of
images. Each opens as a source of samples (data/sample.py), whose `faults` say what of its files is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepwell.data.classes import class_names, read_classes
from stepwell.data.coco import CocoFile
from stepwell.data.fields import Place, Rate, Strict
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps, ListedLabelMaps
from stepwell.data.yolo import YoloFiles

__all__ = [
    "ClassifyData",
    "CocoData",
    "DetectData",
    "ImageFolderData",
    "LabelMapData",
    "PerceptionData",
    "SegmentData",
    "YoloData",
    "data_of",
]

_SPLITS = frozenset("train training val valid validation test testing".split())
_LISTS = ("classes.json", "classes.txt", "classes.csv")


class CocoData(Strict):
    """A COCO file (data/coco.py). images: the folder that file names start from; None: looked for."""

    kind: Literal["coco"]
    weight: Rate | None = None
    annotations: Place
    images: Place | None = None

    def open(self) -> CocoFile:
        """Raises ValueError, OSError and ImportError as CocoFile does."""
        return CocoFile(self.annotations, images=self.images)


class YoloData(Strict):
    """A YOLO data set (data/yolo.py): its YAML file, or a folder with images and labels."""

    kind: Literal["yolo"]
    weight: Rate | None = None
    path: Place
    split: str | None = None

    def open(self) -> YoloFiles:
        """Raises ValueError and OSError as YoloFiles does."""
        return YoloFiles(self.path, split=self.split)


class LabelMapData(Strict):
    """Images with a map of the class of every pixel (data/label_maps.py): of one name in two folders, but for
    how it ends, or pairs of a list. classes: a file of them, or names in the order of their numbers.
    """

    kind: Literal["label_maps"]
    weight: Rate | None = None
    images: Place | None = None
    labels: Place | None = None
    list: Place | None = None
    classes: Place | tuple[str, ...]
    image_ending: str = ""
    label_ending: str = ""

    @model_validator(mode="after")
    def _told_once(self) -> LabelMapData:
        in_folders = self.images is not None and self.labels is not None
        in_list = {"images", "labels", "image_ending", "label_ending"}.isdisjoint(self.model_fields_set)
        if in_folders is (self.list is not None) or (self.list is not None and not in_list):
            raise ValueError("give either images and labels, two folders, or list, a file of pairs")
        return self

    def open(self) -> LabelMaps:
        """Raises ValueError and OSError as LabelMaps and ListedLabelMaps do."""
        if self.list is not None:
            return ListedLabelMaps(self.list, classes=self.classes)
        assert self.images is not None
        assert self.labels is not None
        return LabelMaps(
            self.images,
            self.labels,
            classes=self.classes,
            image_ending=self.image_ending,
            label_ending=self.label_ending,
        )


class ImageFolderData(Strict):
    """A folder of images for every class (data/image_folder.py). classes: a file of their names, or these, in
    the order of their numbers; None: all folders by name.
    """

    kind: Literal["image_folder"]
    weight: Rate | None = None
    path: Place
    classes: Place | tuple[str, ...] | None = None

    def open(self) -> ImageFolder:
        """Raises ValueError and OSError as ImageFolder does."""
        classes = self.classes
        return ImageFolder(
            self.path, classes=class_names(read_classes(classes)) if isinstance(classes, Path) else classes
        )


DetectData = Annotated[CocoData | YoloData, Field(discriminator="kind")]
SegmentData = LabelMapData
ClassifyData = ImageFolderData
PerceptionData = CocoData | YoloData | LabelMapData | ImageFolderData


def data_of(
    source: Path, *, images: Path | None = None, split: str | None = None, classes: Path | None = None
) -> PerceptionData:
    """The entry that a path on a command line means: a COCO file, a list of images and label maps, a YOLO
    data set's YAML file, a folder with `images` and `labels`, one of label maps whose images are named
    beside it, or one of a folder for every class.

    images: of a COCO file, the folder that its names start from; of a folder of label maps, that of their
    images. split: of a YOLO data set, or the folder of that name. classes: a file of them, for label maps
    and folders of classes; label maps have one near them by default. Raises ValueError of one line for what
    is none of these, FileNotFoundError for what is nowhere.
    """
    if not source.exists():
        raise FileNotFoundError(2, "no such file or folder", str(source))
    entry_of = _entry_of_folder if source.is_dir() else _entry_of_file
    entry = entry_of(source, images, split, classes)
    for name, told, whose in (
        ("images", images, "a COCO file or a folder of label maps"),
        ("classes", classes, "label maps or a folder of classes"),
    ):
        if told is not None and getattr(entry, name, None) != told:
            raise ValueError(f"{name} are of {whose}, and {source} is neither")
    return entry


def _entry_of_file(
    path: Path, images: Path | None, split: str | None, classes: Path | None
) -> PerceptionData:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return YoloData(kind="yolo", path=path, split=split)
    if split is not None:
        raise ValueError(f"a split is of a YOLO data set or a folder, and {path} is a file: name the split's")
    if suffix in (".json", ".jsonl"):
        if suffix == ".json" and _begins_as_object(path):
            return CocoData(kind="coco", annotations=path, images=images)
        return LabelMapData(kind="label_maps", list=path, classes=classes or _classes_near(path, path.parent))
    raise ValueError(
        f"{path} is no data set: that is a COCO .json, a .json or .jsonl list of images and labels, the "
        ".yaml of a YOLO data set, or a folder"
    )


def _entry_of_folder(
    path: Path, images: Path | None, split: str | None, classes: Path | None
) -> PerceptionData:
    folders = [entry.name for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[0] != "."]
    if {"images", "labels"} <= {*folders}:
        classes = classes or _list_in(path)
        if classes is not None and not _holds_text(path / "labels"):
            return _entry_of_maps(path, split, classes)
        return YoloData(kind="yolo", path=path, split=split)
    if any(path.glob("*.y*ml")):
        return YoloData(kind="yolo", path=path, split=split)
    if files := sorted([*path.glob("annotations/*.json"), *path.glob("*annotations*.json")]):
        return CocoData(kind="coco", annotations=_file_of_split(path, files, split), images=images)
    if split is not None and split not in folders:
        raise ValueError(f"{path} has no split {split}: there is no folder {path / split}")
    if split is not None:
        return _entry_of_folder(path / split, images, None, classes)
    if images is not None:
        classes = classes or _classes_near(path, path, *path.absolute().parents[:2])
        return LabelMapData(kind="label_maps", images=images, labels=path, classes=classes)
    if folders and {*folders} <= _SPLITS:
        raise ValueError(
            f"{path} holds the splits {', '.join(folders)}; name one, such as {path / folders[0]}"
        )
    if not folders:
        raise ValueError(
            f"{path} is no data set: it should hold a folder of images for every class, or folders images "
            "and labels; of label maps, name the folder of their images too"
        )
    return ImageFolderData(kind="image_folder", path=path, classes=classes)


def _entry_of_maps(path: Path, split: str | None, classes: Path) -> LabelMapData:
    """Of a folder with `images` and `labels`, or those of a split in both."""
    images, labels = (path / name / (split or "") for name in ("images", "labels"))
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"{path} has no split {split}: there is no folder {folder}")
    return LabelMapData(kind="label_maps", images=images, labels=labels, classes=classes)


def _file_of_split(path: Path, files: list[Path], split: str | None) -> Path:
    """Of a folder with COCO files, that of the split, or the only one."""
    named = [file for file in files if split is None or split in _words(file)]
    if len(named) != 1:
        which = f"no file of the split {split}" if not named else "several COCO files"
        raise ValueError(f"{path} holds {which}; name one: {', '.join(map(str, named or files))}")
    return named[0]


def _words(file: Path) -> list[str]:
    return file.stem.split("_")


def _begins_as_object(path: Path) -> bool:
    """Whether JSON is an object, which a COCO file is, and a list of pairs is not. Only its first bytes are
    read: COCO files are large.
    """
    with path.open("rb") as file:
        start = file.read(64)
    return start.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1] == b"{"


def _holds_text(folder: Path) -> bool:
    """Whether there are label files of YOLO's in a folder."""
    return any(path.stem != "classes" for path in folder.rglob("*.txt"))


def _classes_near(path: Path, *folders: Path) -> Path:
    """The list of classes in the first of the folders that holds one."""
    found = next(filter(None, map(_list_in, folders)), None)
    if found is None:
        raise ValueError(
            f"{path} needs a list of classes: put {_LISTS[0]} or {_LISTS[1]} beside it, or name one"
        )
    return found


def _list_in(folder: Path) -> Path | None:
    return next(filter(Path.is_file, (folder / name for name in _LISTS)), None)
