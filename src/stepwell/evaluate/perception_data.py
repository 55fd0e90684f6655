"""Data with known answers for detectors, segmenters and classifiers: opened by the task, told by a digest.

A COCO file for detectors; a folder of label maps, the folder of their images and a list of classes for
segmenters; a folder of images for every class for classifiers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.data.coco import Annotation, CocoFile, CocoImage
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps
from stepwell.evaluate.answers import digest_of_file
from stepwell.evaluate.detection import Rle, TrueObjects, decode_mask, encode_mask, polygons_as_mask
from stepwell.evaluate.kinds import Task
from stepwell.images.label_map import turned
from stepwell.images.open import stored_size
from stepwell.structures import Size

__all__ = [
    "Source",
    "data_classes",
    "digest_of",
    "have_masks",
    "mask_of",
    "open_data",
    "true_objects",
]

Source = CocoFile | LabelMaps | ImageFolder

_CLASSES = ("classes.json", "classes.txt", "classes.csv")


def open_data(task: Task, data: Path, *, images: Path | None = None, classes: Path | None = None) -> Source:
    """images: the folder of a COCO file's images, by default the file's or the one above where the first
    image is there, or that of the images of label maps. classes: a list of the classes of label maps, by
    default a file such as classes.json beside their folder, or above it.

    Raises ValueError for what is missing or is of another form.
    """
    if classes is not None and task != "segmentation":
        raise ValueError(f"the classes of data for {task} are told by the data; leave {classes} out")
    if task == "detection":
        if not data.is_file():
            raise ValueError(f"a detector is scored on a COCO file, and {data} is a folder")
        return _coco(data, images)
    if not data.is_dir():
        raise ValueError(f"a model for {task} is scored on a folder, and {data} is a file")
    if task == "classification":
        if images is not None:
            raise ValueError(f"{data} holds the images; leave {images} out")
        return ImageFolder(data)
    if images is None:
        raise ValueError(f"{data} holds label maps; name the folder of their images with --images")
    if classes is None:
        near = [folder / name for folder in (data, *data.absolute().parents[:2]) for name in _CLASSES]
        classes = next(filter(Path.is_file, near), None)
        if classes is None:
            raise ValueError(
                f"the numbers in {data} need names; name a list of classes with --classes, or put "
                "classes.json beside the folder"
            )
    return LabelMaps(images, data, classes=classes)


def _coco(data: Path, images: Path | None) -> CocoFile:
    source = CocoFile(data, images=images or data.parent)
    if images is None and source.entries and not source.entries[0].path.is_file():
        above = CocoFile(data, images=data.absolute().parent.parent)
        if above.entries[0].path.is_file():
            return above
    return source


def data_classes(source: Source) -> Sequence[str]:
    """Names in the order of labels."""
    if isinstance(source, CocoFile):
        if not source.categories:
            raise ValueError(f"{source.path} names no categories, so its boxes cannot be compared by name")
        return tuple(source.categories.values())
    return source.classes if isinstance(source, ImageFolder) else source.classes.names


def digest_of(source: Source) -> str:
    """Alike for the same images and labels, as far as their names, places and list of classes tell."""
    if isinstance(source, CocoFile):
        return digest_of_file(source.path)
    about = [str(entry) for entry in source.entries], source.classes
    return hashlib.sha256(repr(about).encode()).hexdigest()


def have_masks(source: CocoFile) -> bool:
    """Whether every object of a file has a mask."""
    fields = [each.fields for entry in source.entries for each in entry.annotations]
    return bool(fields) and all(each.get("segmentation") for each in fields)


def true_objects(source: CocoFile, image: CocoImage, *, masks: bool) -> TrueObjects:
    """Raises ValueError for an object without a category, and for a mask that makes no sense."""
    place = {category: label for label, category in enumerate(source.categories)}
    if any(each.category is None for each in image.annotations):
        raise ValueError("an object of it has no category")
    areas: list[Any] = [each.fields.get("area") for each in image.annotations]
    return TrueObjects(
        boxes=np.array([each.box for each in image.annotations], float).reshape(-1, 4),
        labels=np.array([place[each.category] for each in image.annotations], int),
        is_crowd=np.array([each.is_crowd for each in image.annotations], bool),
        masks=[_upright_mask(each, image) for each in image.annotations] if masks else None,
        areas=None if None in areas else np.array(areas, float),
    )


def _upright_mask(annotation: Annotation, image: CocoImage) -> Rle:
    """In the pixels of the upright image, as boxes are."""
    stored, orientation = stored_size(image.path)
    height, width = image.fields.get("height"), image.fields.get("width")
    size = stored if height is None or width is None else (int(height), int(width))
    mask = mask_of(annotation, size)
    if orientation == 1 or size != stored:
        return mask
    return encode_mask(turned(decode_mask(mask).astype(np.int64), orientation))


def mask_of(annotation: Annotation, size: Size) -> Rle:
    """size: (height, width) in which the annotation's polygons or run lengths are told. Raises ValueError for
    neither, and for run lengths of another size.
    """
    segmentation = annotation.fields.get("segmentation")
    if isinstance(segmentation, dict):
        if tuple(segmentation.get("size", ())) != size or "counts" not in segmentation:
            raise ValueError(f"its mask is of size {segmentation.get('size')}, its image {list(size)}")
        counts, pixels = segmentation["counts"], size[0] * size[1]
        if isinstance(counts, list) and sum(counts) != pixels:
            raise ValueError(f"the run lengths of its mask cover {sum(counts)} of {pixels} pixels")
        return segmentation
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"its segmentation is {segmentation!r}, neither polygons nor run lengths"[:200])
    return polygons_as_mask(segmentation, size)
