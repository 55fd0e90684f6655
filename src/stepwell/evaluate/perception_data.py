"""Data with known answers for detectors, segmenters and classifiers: opened for a task, told by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepwell.data.classes import class_names
from stepwell.data.coco import CocoFile
from stepwell.data.entries import YoloData, data_of
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps
from stepwell.data.objects import AnnotatedImage, Annotation
from stepwell.data.summary import LabelledSource
from stepwell.data.yolo import YoloFiles, named_splits
from stepwell.evaluate.answers import digest_of_file
from stepwell.evaluate.detection import Rle, TrueObjects
from stepwell.evaluate.kinds import Task

__all__ = ["ObjectSource", "Source", "data_classes", "digest_of", "open_data", "true_objects", "used_labels"]

Source = CocoFile | YoloFiles | LabelMaps | ImageFolder

_KINDS: Mapping[Task, Sequence[str]] = {
    "detection": ("coco", "yolo"),
    "segmentation": ("label_maps",),
    "classification": ("image_folder",),
}
_WORDS = {
    "coco": "a COCO file",
    "yolo": "a YOLO data set",
    "label_maps": "images with label maps",
    "image_folder": "a folder of images for every class",
}


class ObjectSource(LabelledSource, Protocol):
    """A source of AnnotatedImages."""

    @property
    def has_masks(self) -> bool:
        """Whether every object has one, and there is an object."""


def open_data(
    task: Task,
    data: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    classes: Path | None = None,
) -> Source:
    """What `data_of` takes; of a YOLO data set by default the split val, where it names one. Raises as it
    does, and ValueError for data of another kind than the task's.
    """
    entry = data_of(data, images=images, split=split, classes=classes)
    if isinstance(entry, YoloData) and split is None and "val" in named_splits(entry.path):
        entry = entry.model_copy(update={"split": "val"})
    if entry.kind not in _KINDS[task]:
        wanted = " or ".join(_WORDS[kind] for kind in _KINDS[task])
        raise ValueError(f"a model for {task} is scored on {wanted}, and {data} is {_WORDS[entry.kind]}")
    return entry.open()


def data_classes(source: LabelledSource) -> Sequence[str]:
    """Names in the order of labels. Raises ValueError where there are none."""
    names = class_names(source.classes)
    if not names:
        raise ValueError("the data name no classes, so nothing in them can be compared by name")
    return names


def digest_of(source: Source) -> str:
    """Alike while no file of images and labels is another, by its place, size and time, and the classes are
    the same.
    """
    told = digest_of_file(source.path) if isinstance(source, CocoFile) else source.entries
    about = source.classes, told, [_stamp(path) for path in _files(source)]
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _files(source: Source) -> Iterable[Path]:
    if isinstance(source, CocoFile):
        return (entry.path for entry in source.entries)
    if isinstance(source, YoloFiles):
        return source.files
    if isinstance(source, LabelMaps):
        return chain.from_iterable(source.entries)
    return (image for image, _ in source.entries)


def _stamp(path: Path) -> tuple[str, int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return str(path), about.st_size, about.st_mtime_ns


def used_labels(source: LabelledSource) -> frozenset[int] | None:
    """Those that objects have, since a file of objects may name more; None where that is not known."""
    if isinstance(source, CocoFile):
        return frozenset(
            each.label for entry in source.entries for each in entry.annotations if each.label is not None
        )
    if isinstance(source, YoloFiles):
        return frozenset(line.label for lines in source.entries for line in lines)
    return None


def true_objects(image: AnnotatedImage, *, masks: bool) -> TrueObjects:
    """Raises ValueError for an object without a category, and for one without a mask where these count."""
    things = image.annotations
    if any(each.label is None for each in things):
        raise ValueError("an object of it has no category")
    areas: list[Any] = [each.fields.get("area") for each in things]
    return TrueObjects(
        boxes=np.array([each.box for each in things], float).reshape(-1, 4),
        labels=np.array([each.label for each in things], int),
        is_crowd=np.array([each.is_crowd for each in things], bool),
        masks=[_run_lengths(each) for each in things] if masks else None,
        areas=None if None in areas else np.array(areas, float),
    )


def _run_lengths(annotation: Annotation) -> Rle:
    if annotation.mask is None:
        raise ValueError("an object of it has no mask")
    return annotation.mask.run_lengths()
