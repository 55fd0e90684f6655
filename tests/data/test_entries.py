"""Entries of perception data: as recipes write them, and as people name them on a command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from stepwell.data.classes import class_names
from stepwell.data.coco import CocoFile
from stepwell.data.entries import (
    ClassifyData,
    CocoData,
    DetectData,
    ImageFolderData,
    LabelMapData,
    SegmentData,
    YoloData,
    data_of,
)
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps, ListedLabelMaps
from stepwell.data.yolo import YoloFiles

IMAGE = object()


@pytest.fixture
def files(tmp_path):
    """files({name: content, ...}) -> their folder; IMAGE is 6 x 4 pixels, which may be a map of class 0."""

    def made(contents):
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is IMAGE:
                Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return made


def coco(name="a.png"):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 2]}
    image = {"id": 1, "file_name": name, "height": 4, "width": 6}
    return {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}


PAIRS = [{"image": "images/a.png", "label": "labels/a.png"}]
MAPS = {"images/train/a.png": IMAGE, "labels/train/a.png": IMAGE, "classes.json": ["cat"]}
YOLO = {"images/train/a.png": IMAGE, "labels/train/a.txt": "0 0.5 0.5 1 1"}
YAML = {"data.yaml": "train: images/train\nval: images/train\nnames: [cat]\n"}


@pytest.mark.parametrize(
    ("contents", "typed", "kind"),
    [
        ({"a.json": coco(), "a.png": IMAGE}, {"source": "a.json"}, CocoFile),
        ({"a.json": coco(), "images/a.png": IMAGE}, {"source": "a.json"}, CocoFile),
        ({"x/a.json": coco(), "images/a/a.png": IMAGE}, {"source": "x/a.json"}, CocoFile),
        ({"x/a.json": coco(), "far/off/a.png": IMAGE}, {"source": "x/a.json", "images": "far/off"}, CocoFile),
        ({"annotations/a.json": coco(), "images/a.png": IMAGE}, {"source": ""}, CocoFile),
        (
            {"annotations/train.json": coco(), "annotations/val.json": {}, "images/train/a.png": IMAGE},
            {"source": "", "split": "train"},
            CocoFile,
        ),
        (
            {"annotations/instances_val.json": coco(), "annotations/x_y.json": {}, "images/val/a.png": IMAGE},
            {"source": "", "split": "val"},
            CocoFile,
        ),
        ({"train/_annotations.coco.json": coco(), "train/a.png": IMAGE}, {"source": "train"}, CocoFile),
        (
            {"train/_annotations.coco.json": coco(), "train/a.png": IMAGE},
            {"source": "", "split": "train"},
            CocoFile,
        ),
        ({**YOLO, **YAML}, {"source": "data.yaml"}, YoloFiles),
        ({**YOLO, **YAML}, {"source": "data.yaml", "split": "val"}, YoloFiles),
        ({**YOLO, **YAML}, {"source": ""}, YoloFiles),
        ({**YOLO, "classes.txt": "cat"}, {"source": ""}, YoloFiles),
        ({**YOLO, "classes.txt": "cat"}, {"source": "", "split": "train"}, YoloFiles),
        (
            {
                "train/images/a.png": IMAGE,
                "train/labels/a.txt": "0 0.5 0.5 1 1",
                "data.yaml": "train: ../train/images\nnames: [cat]",
            },
            {"source": ""},
            YoloFiles,
        ),
        (MAPS, {"source": ""}, LabelMaps),
        (MAPS, {"source": "", "split": "train"}, LabelMaps),
        ({**MAPS, "labels/classes.txt": "cat"}, {"source": ""}, LabelMaps),
        (
            {
                "images/a.png": IMAGE,
                "labels/a.png": IMAGE,
                "l.json": PAIRS,
                "classes.txt": "cat",
            },
            {"source": "l.json"},
            ListedLabelMaps,
        ),
        (
            {
                "images/a.png": IMAGE,
                "labels/a.png": IMAGE,
                "l.jsonl": json.dumps(PAIRS[0]),
                "classes.json": ["cat"],
            },
            {"source": "l.jsonl"},
            ListedLabelMaps,
        ),
        (
            {"x/images/a.png": IMAGE, "x/labels/a.png": IMAGE, "far/classes.txt": "cat"},
            {"source": "x", "classes": "far/classes.txt"},
            LabelMaps,
        ),
        (
            {"x/y/maps/a.png": IMAGE, "photos/a.png": IMAGE, "x/classes.txt": "cat"},
            {"source": "x/y/maps", "images": "photos"},
            LabelMaps,
        ),
        (
            {"maps/val/b/a.png": IMAGE, "photos/b/a.png": IMAGE, "maps/val/classes.txt": "cat", "c.txt": "x"},
            {"source": "maps", "images": "photos", "split": "val"},
            LabelMaps,
        ),
        (
            {"maps/a.png": IMAGE, "photos/a.png": IMAGE, "maps/classes.txt": "dog", "c.txt": "cat"},
            {"source": "maps", "images": "photos", "classes": "c.txt"},
            LabelMaps,
        ),
        (
            {"images/a.png": IMAGE, "labels/a.png": IMAGE, "l.json": PAIRS, "far/c.txt": "cat"},
            {"source": "l.json", "classes": "far/c.txt"},
            ListedLabelMaps,
        ),
        ({"x/cat/a.png": IMAGE, "c.txt": "cat"}, {"source": "x", "classes": "c.txt"}, ImageFolder),
        (
            {"annotations/a.json": coco(), "far/off/a.png": IMAGE},
            {"source": "", "images": "far/off"},
            CocoFile,
        ),
        (
            {"train/_annotations.coco.json": coco(), "far/off/a.png": IMAGE},
            {"source": "", "split": "train", "images": "far/off"},
            CocoFile,
        ),
        ({"cat/a.png": IMAGE}, {"source": ""}, ImageFolder),
        ({"val/cat/a.png": IMAGE, "train/x/b.png": IMAGE}, {"source": "", "split": "val"}, ImageFolder),
        ({"val/cat/a.png": IMAGE, "train/x/b.png": IMAGE}, {"source": "val"}, ImageFolder),
    ],
)
def test_what_people_name_is_opened(files, contents, typed, kind):
    folder = files(contents)
    paths = {key: folder / typed[key] for key in ("source", "images", "classes") if key in typed}
    entry = data_of(**paths, split=typed.get("split"))
    source = entry.open()
    assert type(source) is kind
    assert len(source) == 1
    assert getattr(source, "faults", []) == []
    assert class_names(source.classes) == ("cat",)
    source[0]
    with pytest.raises(ValidationError):
        type(entry)(**entry.model_dump(exclude={"kind"}), kind="other")


def test_json_of_windows_is_told_apart_too(files):
    folder = files({"a.png": IMAGE})
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / "a.json").write_bytes(f"\n {json.dumps(coco())}".encode(encoding))
        assert isinstance(data_of(folder / "a.json").open(), CocoFile)


@pytest.mark.parametrize(
    ("contents", "typed", "complaint"),
    [
        ({"a.txt": "a.png"}, {"source": "a.txt"}, r"a\.txt is no data set: that is a COCO \.json, a"),
        (
            {"a.json": coco()},
            {"source": "a.json", "split": "val"},
            "a split is of a YOLO data set or a folder",
        ),
        ({"a.json": PAIRS}, {"source": "a.json"}, r"needs a list of classes: put classes\.json"),
        (YAML, {"source": "data.yaml", "images": ""}, "images are of a COCO file or a folder of label maps"),
        (
            MAPS,
            {"source": "", "images": "labels"},
            "images are of a COCO file or a folder of label maps, and",
        ),
        (
            {"a.json": PAIRS, "classes.txt": "cat"},
            {"source": "a.json", "images": ""},
            "images are of .*, and .* neither",
        ),
        (
            {"a.json": coco(), "c.txt": "cat"},
            {"source": "a.json", "classes": "c.txt"},
            "classes are of label maps or a folder of classes, and .* is neither",
        ),
        (
            {"maps/a.png": IMAGE},
            {"source": "maps", "images": ""},
            "maps needs a list of classes: .* or name one",
        ),
        ({"maps/a.png": IMAGE}, {"source": "maps"}, "of label maps, name the folder of their images too"),
        (
            {"annotations/a.json": {}, "annotations/b.json": {}},
            {"source": ""},
            "several COCO files; name one: .*a",
        ),
        (
            {"annotations/a.json": {}},
            {"source": "", "split": "c"},
            r"no file of the split c; name one: .*a\.json",
        ),
        (
            {"train/a/b.png": IMAGE, "val/a/b.png": IMAGE},
            {"source": ""},
            "holds the splits train, val; name one",
        ),
        ({"cat/a.png": IMAGE}, {"source": "", "split": "val"}, "has no split val: there is no folder"),
        (MAPS, {"source": "", "split": "val"}, "has no split val: there is no folder .*images/val"),
        ({**MAPS, "images/val/b.png": IMAGE}, {"source": "", "split": "val"}, "no folder .*labels/val"),
        (
            {"a.png": IMAGE},
            {"source": ""},
            "is no data set: it should hold a folder of images for every class",
        ),
        ({".git/a.png": IMAGE}, {"source": ""}, "is no data set: it should hold a folder of images"),
    ],
)
def test_what_is_no_data_set_is_refused_with_what_would_be_right(files, contents, typed, complaint):
    folder = files(contents)
    paths = {key: folder / typed[key] for key in ("source", "images", "classes") if key in typed}
    with pytest.raises(ValueError, match=complaint) as refusal:
        data_of(**paths, split=typed.get("split"))
    assert "\n" not in str(refusal.value)


def test_what_is_nowhere_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError) as refusal:
        data_of(tmp_path / "gone")
    assert refusal.value.filename == str(tmp_path / "gone")


# As recipes write them


def test_kinds_tell_entries_apart():
    detect = TypeAdapter(DetectData)
    coco_data = detect.validate_python({"kind": "coco", "annotations": "a.json"})
    assert isinstance(coco_data, CocoData)
    assert (coco_data.weight, coco_data.images) == (None, None)
    yolo = detect.validate_python({"kind": "yolo", "path": "a.yaml", "split": "val", "weight": 2})
    assert isinstance(yolo, YoloData)
    assert (yolo.weight, yolo.split) == (2.0, "val")
    maps = {"kind": "label_maps", "images": "a", "labels": "b", "classes": ["x"]}
    assert isinstance(TypeAdapter(SegmentData).validate_python(maps), LabelMapData)
    photos = {"kind": "image_folder", "path": "a"}
    assert isinstance(TypeAdapter(ClassifyData).validate_python(photos), ImageFolderData)


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "voc", "annotations": "a.json"},
        {"annotations": "a.json"},
        {"kind": "coco", "annotations": "a.json", "path": "b"},
        {"kind": "coco"},
        {"kind": "coco", "annotations": "a.json", "weight": 0},
        {"kind": "yolo"},
    ],
)
def test_entries_are_strict(entry):
    with pytest.raises(ValidationError):
        TypeAdapter(DetectData).validate_python(entry)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"images": "a"},
        {"labels": "a"},
        {"images": "a", "labels": "b", "list": "c"},
        {"images": "a", "list": "c"},
        {"label_ending": "_x", "list": "c"},
    ],
)
def test_label_maps_are_told_once(fields):
    with pytest.raises(ValidationError, match="give either images and labels, two folders, or list"):
        LabelMapData(kind="label_maps", classes=["x"], **fields)


def test_endings_and_classes_reach_their_readers(files):
    folder = files(
        {"images/a_x.png": IMAGE, "labels/a_y.png": IMAGE, "c/dog/a.png": IMAGE, "c/cat/a.png": IMAGE}
    )
    maps = LabelMapData(
        kind="label_maps",
        images=folder / "images",
        labels=folder / "labels",
        classes=["cat"],
        image_ending="_x",
        label_ending="_y",
    ).open()
    assert (len(maps), maps.classes.names) == (1, ("cat",))
    (folder / "order.txt").write_text("dog\ncat\n")
    for classes in (["dog", "cat"], folder / "order.txt"):
        photos = ImageFolderData(kind="image_folder", path=folder / "c", classes=classes).open()
        assert photos.classes == ("dog", "cat")
    assert ImageFolderData(kind="image_folder", path=folder / "c").open().classes == ("cat", "dog")
