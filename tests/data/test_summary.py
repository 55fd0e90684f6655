"""What a source holds, counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from stepwell.data.classes import ClassList
from stepwell.data.coco import CocoFile
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps
from stepwell.data.summary import ClassCount, Sizes, short_name, summary
from stepwell.images.limits import DEFAULT_LIMITS
from stepwell.images.open import open_image

SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


@pytest.fixture
def coco(tmp_path):
    """Pictures of 40 x 30, 60 x 50, 20 x 90 and one of another size than is said; of these the second is
    empty, and the third holds a crowd alone.
    """
    sizes = {"a.png": (40, 30), "b.png": (60, 50), "c.png": (20, 90), "d.png": (8, 8)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name)
    sizes["d.png"] = (9, 9)
    images = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, (name, (width, height)) in enumerate(sizes.items())
    ]
    marks = [
        {"image_id": 0, "category_id": 1, "bbox": [0, 0, 3, 4]},
        {"image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 1], "segmentation": SQUARE},
        {"image_id": 0, "category_id": 2, "bbox": [0, 0, 20, 20]},
        {"image_id": 0, "bbox": [0, 0, 2.5, 2]},
        {"image_id": 0, "category_id": 3, "bbox": [0, 0, 0, 20]},
        {"image_id": 2, "category_id": 3, "bbox": [0, 0, 20, 90], "iscrowd": 1, "segmentation": SQUARE},
        {"image_id": 3, "category_id": 3, "bbox": [0, 0, 2, 2]},
    ]
    categories = [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "dog"), (3, "cow"))]
    file = {"images": images, "annotations": marks, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(file))
    return CocoFile(tmp_path / "coco.json")


def test_objects_are_counted_by_class(coco, tmp_path):
    report = summary(coco)
    assert (report.kind, report.pictures, report.empty) == ("objects", 3, 2)
    assert report.classes == (
        ClassCount(name="cat", pictures=1, objects=2),
        ClassCount(name="dog", pictures=1, objects=1),
        ClassCount(name="cow", pictures=0),
    )
    assert (report.objects, report.unnamed, report.masks, report.crowds) == (4, 1, 1, 1)
    assert report.picture_sizes == Sizes((30, 40), (90, 20), (50, 60))
    assert report.object_sizes == Sizes((2, 2.5), (4, 3), (20, 20))
    assert [where.removeprefix(f"{tmp_path / 'coco.json'}, ") for where, _ in report.faults] == [
        "annotations[4]",
        "image d.png (id 3)",
    ]
    assert "the file says 9 x 9 pixels" in report.faults[1][1]


def test_its_text_is_aligned(coco):
    assert summary(coco).text().splitlines() == [
        "3 pictures, 2 of them empty, 4 objects, 1 with masks, 1 of no category, 1 crowd, 3 classes",
        "class  pictures  objects",
        "cat           1        2",
        "dog           1        1",
        "cow           0        0",
        "              smallest   median  largest",
        "picture size   40 x 30  20 x 90  60 x 50",
        "object size    2.5 x 2    3 x 4  20 x 20",
        "left out: 2",
    ]


def test_its_fields_are_json(coco):
    fields = json.loads(json.dumps(summary(coco).fields()))
    assert fields["classes"][0] == {"name": "cat", "pictures": 1, "objects": 2, "pixels": 0}
    assert fields["picture_sizes"] == [[30, 40], [90, 20], [50, 60]]
    assert len(fields["faults"]) == 2


@pytest.fixture
def maps(tmp_path):
    for name, values in (("a", [[0, 0, 2], [2, 255, 2]]), ("b", [[255, 255]])):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        labels = np.array(values, dtype=np.uint8)
        Image.fromarray(labels).save(tmp_path / f"labels/{name}.png")
        Image.fromarray(labels).save(tmp_path / f"images/{name}.png")
    Image.new("L", (2, 2)).save(tmp_path / "images/c.png")
    classes = ClassList(names=("road", "tree", "roof"))
    return LabelMaps(tmp_path / "images", tmp_path / "labels", classes=classes)


def test_pixels_are_counted_by_class(maps, tmp_path):
    report = summary(maps)
    assert (report.kind, report.pictures, report.empty, report.objects) == ("pixels", 2, 1, 0)
    assert report.classes == (
        ClassCount(name="road", pictures=1, pixels=2),
        ClassCount(name="tree", pictures=0),
        ClassCount(name="roof", pictures=1, pixels=3),
    )
    assert (report.ignored, report.object_sizes) == (3, None)
    assert report.picture_sizes == Sizes((1, 2), (2, 3), (2, 3))
    assert report.faults == ((str(tmp_path / "images/c.png"), "it has no map"),)
    assert report.text().splitlines() == [
        "2 pictures, 1 of them empty, 3 classes",
        "class      pictures  pixels",
        "road              1  25.0 %",
        "tree              0   0.0 %",
        "roof              1  37.5 %",
        "(ignored)            37.5 %",
        "no pixel is tree, and some are ignored: where the maps store a class as 255, list the classes by "
        "number, with another ignore_index",
        "              smallest  median  largest",
        "picture size     2 x 1   3 x 2    3 x 2",
        "left out: 1",
    ]


@pytest.fixture
def photos(tmp_path):
    for name, size in (("cat/a.png", (9, 4)), ("cat/b.png", (3, 4)), ("dog/c.png", (3, 5))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / name)
    return tmp_path


def test_images_are_counted_by_class(photos):
    report = summary(ImageFolder(photos))
    assert (report.kind, report.pictures, report.empty, report.objects) == ("images", 3, 0, 0)
    assert report.classes == (ClassCount(name="cat", pictures=2), ClassCount(name="dog", pictures=1))
    assert report.text().splitlines() == [
        "3 pictures, 2 classes",
        "class  pictures",
        "cat           2",
        "dog           1",
        "              smallest  median  largest",
        "picture size     3 x 4   3 x 5    9 x 4",
        "nothing is left out",
    ]


def test_pictures_are_not_decoded_and_bad_ones_are_told(photos):
    """Of a.jpg only the header is there."""
    Image.new("RGB", (9, 4)).save(photos / "cat/a.jpg")
    raw = (photos / "cat/a.jpg").read_bytes()
    (photos / "cat/a.jpg").write_bytes(raw[: raw.index(b"\xff\xda") + 14])
    with pytest.raises(ValueError, match="damaged"):
        open_image(photos / "cat/a.jpg")
    (photos / "dog/d.png").write_text("no image")
    report = summary(ImageFolder(photos))
    assert report.pictures == 4
    assert [where for where, _ in report.faults] == [str(photos / "dog/d.png")]


def test_nothing_is_summed_up_too(tmp_path):
    (tmp_path / "a.json").write_text('{"images": []}')
    text = summary(CocoFile(tmp_path / "a.json")).text()
    assert text.splitlines() == ["0 pictures, 0 classes", "class  pictures", "nothing is left out"]


def test_progress_is_told(photos):
    steps = []
    summary(ImageFolder(photos), progress=lambda count, total: steps.append((count, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_many_classes_are_cut_short(tmp_path):
    categories = [{"id": i, "name": f"c{i}"} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "categories": categories}))
    lines = summary(CocoFile(tmp_path / "a.json")).text().splitlines()
    assert lines[-3].split() == ["c39", "0"]
    assert lines[-2] == "and 10 more classes"


def test_names_of_strangers_stay_on_their_line():
    assert short_name("a\nb\t\x85c\udcff") == "a b c\N{REPLACEMENT CHARACTER}"
    assert short_name("x" * 41) == "x" * 37 + "..."
    assert short_name("x" * 40) == "x" * 40


def test_samples_of_another_kind_are_no_perception_data():
    class Others:
        classes = ()
        limits = DEFAULT_LIMITS

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return "a text"

        def where(self, index):
            return "somewhere"

    ((where, reason),) = summary(Others()).faults
    assert where == "somewhere"
    assert reason == "a str is no sample of detectors, segmenters or classifiers"
