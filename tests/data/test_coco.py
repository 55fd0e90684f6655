"""COCO files as people have them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stepwell.data.coco import CocoFile, turned_box
from stepwell.data.masks import encode_mask
from stepwell.images.open import open_image

BOX = [20, 30, 50, 10]


@pytest.fixture
def coco(tmp_path):
    """coco(annotations, ...) -> the file, of one image of 120 x 80 pixels that is black in BOX."""

    def made(*annotations, image=None, orientation=1, ending="jpg", categories=None, **fields):
        page = Image.new("RGB", (120, 80), "white")
        ImageDraw.Draw(page).rectangle((20, 30, 69, 39), fill="black")
        exif = Image.Exif()
        exif[0x112] = orientation
        page.save(tmp_path / f"page.{ending}", exif=exif, **({"quality": 95} if ending == "jpg" else {}))
        entry = {"id": 1, "file_name": f"page.{ending}", "width": 120, "height": 80, **(image or {})}
        file = {"images": [entry], "annotations": list(annotations), **fields}
        if categories:
            file["categories"] = categories
        (tmp_path / "coco.json").write_text(json.dumps(file))
        return CocoFile(tmp_path / "coco.json", images=tmp_path)

    return made


def annotation(**changes):
    return {"id": 1, "image_id": 1, "category_id": 7, "bbox": BOX, "iscrowd": 0, **changes}


def test_boxes_are_corners_with_what_is_in_them(coco):
    source = coco(annotation(), annotation(iscrowd=1, text="x"), categories=[{"id": 7, "name": "bar"}])
    page = source[0]
    assert (len(source), page.path.name, page.size) == (1, "page.jpg", (80, 120))
    assert [one.box for one in page.annotations] == [(20, 30, 70, 40)] * 2
    assert [one.is_crowd for one in page.annotations] == [False, True]
    assert page.annotations[1].fields["text"] == "x"
    assert (source.categories, page.annotations[0].category) == ({7: "bar"}, 7)
    assert source.faults == []


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_with_their_image(coco, orientation, ending):
    page = coco(annotation(), orientation=orientation, ending=ending)[0]
    pixels = np.asarray(open_image(page.path).convert("L"), dtype=float)
    assert pixels.shape == page.size
    left, top, right, bottom = map(int, page.annotations[0].box)
    assert pixels[top + 1 : bottom - 1, left + 1 : right - 1].max() < 40
    pixels[top - 1 : bottom + 1, left - 1 : right + 1] = 255
    assert pixels.min() > 200


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_an_image_measured_upright_stay(coco, orientation):
    page = coco(annotation(), image={"width": 80, "height": 120}, orientation=orientation)[0]
    assert page.size == (120, 80)
    assert page.annotations[0].box == (20, 30, 70, 40)


def test_turning_back_gives_the_box_again():
    box, stored = (3.0, 4.0, 10.0, 6.0), (20, 30)
    for orientation, back in zip(range(1, 9), (1, 2, 3, 4, 5, 8, 7, 6), strict=True):
        turned = stored[::-1] if orientation >= 5 else stored
        assert turned_box(turned_box(box, stored, orientation), turned, back) == box


@pytest.mark.parametrize("size", [(120, 81), (119, 80), (1200, 800)])
def test_an_image_of_another_size_than_the_file_says_is_refused(coco, size):
    source = coco(annotation(bbox=[1, 2, 3, 4]), image={"width": size[0], "height": size[1]})
    with pytest.raises(ValueError, match=rf"the file says {size[0]} x {size[1]} pixels, and .*has 120 x 80"):
        source[0]


@pytest.mark.parametrize("image", [{"width": None}, {"height": None}, {"width": None, "height": None}])
def test_a_size_that_the_file_does_not_say_is_the_images(coco, image):
    source = coco(annotation(bbox=[100, 70, 50, 50]), annotation(bbox=[130, 10, 5, 5]), image=image)
    assert [one.box for one in source[0].annotations] == [(100, 70, 120, 80)]
    assert len(source.faults) == 1


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bbox": None}, "its bbox is None, not"),
        ({"bbox": []}, "its bbox is [], not"),
        ({"bbox": [1, 2, 3]}, "not [left, top, width, height]"),
        ({"bbox": [1, 2, NAN, 4]}, "not [left, top, width, height]"),
        ({"bbox": [1, 2, float("inf"), 4]}, "not [left, top, width, height]"),
        ({"bbox": [1, 2, "3", 4]}, "not [left, top, width, height]"),
        ({"bbox": {"x": 1}}, "not [left, top, width, height]"),
        ({"bbox": [1, 2, 10**400, 4]}, "int too large"),
        ({"bbox": [1, 2, 0, 4]}, "has no width"),
        ({"bbox": [1, 2, 3, 0]}, "has no height"),
        ({"bbox": [50, 50, -3, 4]}, "has no width"),
        ({"bbox": [120, 2, 3, 4]}, "lies outside of 120 x 80 pixels"),
        ({"bbox": [-9, 2, 9, 4]}, "lies outside of 120 x 80 pixels"),
        ({"image_id": 2}, "its image_id 2 is of no image"),
        ({"image_id": None}, "its image_id None is of no image"),
        ({"image_id": [1]}, "its image_id [1] is of no image"),
        ({"area": "big"}, "its area is 'big'"),
        ({"area": {}}, "its area is {}"),
        ({"area": -1}, "its area is -1"),
        ({"iscrowd": "yes"}, "its iscrowd is 'yes', not 0 or 1"),
        ({"category_id": 8}, "its category_id 8 is of no category"),
    ],
)
def test_an_annotation_that_makes_no_sense_is_named_and_left_out(coco, tmp_path, changes, complaint):
    source = coco(annotation(), annotation(id=2, **changes), categories=[{"id": 7}])
    assert [one.box for one in source[0].annotations] == [(20, 30, 70, 40)]
    ((where, reason),) = source.faults
    assert where == f"{tmp_path / 'coco.json'}, annotations[1], id 2"
    assert complaint in reason


def test_fields_that_are_not_there_are_named_too(coco):
    lacking = annotation()
    del lacking["bbox"], lacking["category_id"], lacking["iscrowd"]
    source = coco(lacking, {**lacking, "bbox": BOX}, None, "text", categories=[{"id": 7}, {"name": "x"}, 3])
    assert [(one.category, one.is_crowd) for one in source[0].annotations] == [(None, False)]
    assert [where.split(", ")[1] for where, _ in source.faults] == [
        *("categories[1]", "categories[2]", "annotations[0]", "annotations[2]", "annotations[3]"),
    ]


@pytest.mark.parametrize(
    "image",
    [{"id": None}, {"file_name": None}, {"file_name": ""}, {"width": 0}, {"height": "80"}, {"id": {}}],
)
def test_an_image_that_makes_no_sense_is_named_and_left_out(coco, image):
    source = coco(annotation(), image=image)
    assert len(source) == 0
    assert [where.split(", ")[1] for where, _ in source.faults] == ["images[0]", "annotations[0]"]


def test_images_of_one_id_are_one(coco, tmp_path):
    source = coco(annotation(), images=[{"id": 1, "file_name": name} for name in ("page.jpg", "other.jpg")])
    assert [source[i].path.name for i in range(len(source))] == ["page.jpg"]
    assert source.faults[0] == (f"{tmp_path / 'coco.json'}, images[1], id 1", "another image has the same id")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"images": null}', '{"images": [], "annotations": 5}', "{", ""]
)
def test_what_is_no_coco_file_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is (no COCO file|not JSON)"):
        CocoFile(tmp_path / "x.json", images=tmp_path)


def test_a_byte_order_mark_ends_nothing(coco, tmp_path):
    coco(annotation())
    (tmp_path / "coco.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "coco.json").read_bytes())
    assert len(CocoFile(tmp_path / "coco.json", images=tmp_path)[0].annotations) == 1


def test_file_names_of_windows_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "b.png")
    (tmp_path / "x.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a\\b.png"}]}))
    assert CocoFile(tmp_path / "x.json", images=tmp_path)[0].size == (4, 4)


# Masks, of the bar in BOX: two polygons that it is made of, and the run lengths of its pixels

LEFT, RIGHT = [20, 30, 40, 30, 40, 40, 20, 40], [40, 30, 70, 30, 70, 40, 40, 40]
IN_BOX = np.zeros((80, 120), dtype=bool)
IN_BOX[30:40, 20:70] = True
RUNS = {"size": [80, 120], "counts": [20 * 80 + 30, *([10, 70] * 49), 10, 40 + 50 * 80]}
FORMS = {"polygons": [LEFT, RIGHT], "runs": RUNS, "compressed": encode_mask(IN_BOX)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_turned_with_their_image(coco, orientation, form):
    page = coco(annotation(segmentation=FORMS[form]), orientation=orientation)[0]
    dark = np.asarray(open_image(page.path).convert("L")) < 128
    mask = page.annotations[0].mask.pixels()
    assert mask.shape == page.size
    assert mask.dtype == bool
    assert (mask & dark).sum() == 500 == mask.sum()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_of_an_image_measured_upright_stay(coco, orientation):
    image = {"width": 80, "height": 120}
    page = coco(annotation(segmentation=[LEFT]), image=image, orientation=orientation)[0]
    rows, cols = page.annotations[0].mask.pixels().nonzero()
    assert (cols.min(), cols.max(), rows.min(), rows.max()) == (20, 39, 30, 39)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bbox", [None, []])
def test_an_annotation_without_a_box_has_that_of_its_mask(coco, form, bbox):
    source = coco(annotation(segmentation=FORMS[form], bbox=bbox))
    assert source[0].annotations[0].box == (20, 30, 70, 40)
    assert source.faults == []


def test_a_box_stays_as_it_is_told_beside_a_mask(coco):
    assert coco(annotation(segmentation=[LEFT]))[0].annotations[0].box == (20, 30, 70, 40)
    cut = coco(annotation(segmentation=[[-9, -9, 30, -9, 30, 40]], bbox=None))[0].annotations[0]
    assert cut.box == (0, 0, 30, 40)


@pytest.mark.parametrize("segmentation", [None, [], {}, [[]]])
def test_an_annotation_may_have_no_mask(coco, segmentation):
    source = coco(annotation(segmentation=segmentation))
    assert (source[0].annotations[0].mask, source.faults) == (None, [])


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        ([[1, 2, 3, 4]], "not x and y of three points"),
        ({"size": [120, 80], "counts": [9600]}, "is of size [120, 80], its image [80, 120]"),
        ({"size": [80, 120], "counts": [9599]}, "do not add up to the 9600 pixels"),
        ({"size": [80, 120], "counts": [9600]}, "has no pixel"),
        ({"size": [80, 120], "counts": "é"}, "no compressed run lengths"),
        ([[130, 2, 140, 2, 140, 9]], "its segmentation lies outside of 120 x 80 pixels"),
        ([[3, 2, 3, 5, 3, 9]], "its segmentation has no width"),
        ([[3, 2, 5, 2, 9, 2]], "its segmentation has no height"),
        ("text", "neither polygons nor run lengths"),
    ],
)
@pytest.mark.parametrize("bbox", [BOX, None])
def test_an_annotation_with_a_bad_mask_is_named_and_left_out(coco, tmp_path, segmentation, complaint, bbox):
    source = coco(annotation(id=7), annotation(id="x\ny", segmentation=segmentation, bbox=bbox))
    assert len(source[0].annotations) == 1
    ((where, reason),) = source.faults
    assert where == f"{tmp_path / 'coco.json'}, annotations[1], id 'x\\ny'"
    assert complaint in reason


# Classes


def test_classes_come_by_the_ids_of_their_categories(coco):
    ids, names = [90, 3, 7], ["z", "b", "a"]
    listed = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    marks = [annotation(category_id=i) for i in (7, 90, None, 3)]
    source = coco(*marks, categories=listed)
    assert source.classes == ("b", "a", "z")
    assert source.category_ids == (3, 7, 90)
    assert [one.label for one in source[0].annotations] == [1, 2, None, 0]
    assert [one.category for one in source[0].annotations] == [7, 90, None, 3]


def test_ids_of_categories_may_be_numbers_and_texts(coco, tmp_path):
    source = coco(categories=[{"id": "b"}, {"id": 7}, {"id": 2.5}, {"id": "a"}, {"id": 7, "name": "again"}])
    assert source.category_ids == (2.5, 7, "a", "b")
    reason = "another category has the same id"
    assert source.faults == [(f"{tmp_path / 'coco.json'}, categories[4], id 7", reason)]


def test_a_file_without_categories_has_no_labels(coco):
    source = coco(annotation(category_id=5))
    assert (source.classes, source[0].annotations[0].label, source[0].annotations[0].category) == (
        (),
        None,
        5,
    )


# Where images are


@pytest.mark.parametrize(
    ("file", "image", "name"),
    [
        ("a.json", "a.png", "a.png"),
        ("a.json", "images/a.png", "a.png"),
        ("a.json", "images/a.png", "images/a.png"),
        ("train.json", "train/a.png", "a.png"),
        ("annotations/a.json", "b/a.png", "b/a.png"),
        ("annotations/a.json", "images/a.png", "a.png"),
        ("annotations/train.json", "images/train/a.png", "a.png"),
        ("annotations/train.json", "train/a.png", "a.png"),
        ("annotations/instances_val2017.json", "images/val2017/a.png", "a.png"),
        ("annotations/instances_val2017.json", "val2017/a.png", "a.png"),
    ],
)
def test_the_folder_of_images_is_found_where_people_have_it(tmp_path, file, image, name):
    for path in (tmp_path / file, tmp_path / image):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4)).save(tmp_path / image)
    images = [{"id": 1, "file_name": "gone.png"}, 3, {"id": 2}, {"id": 9, "file_name": "\0" + "x" * 999}]
    images.append({"id": 3, "file_name": name, "width": 5, "height": 4})
    (tmp_path / file).write_text(json.dumps({"images": images}))
    source = CocoFile(tmp_path / file)
    assert [entry.path for entry in source.entries] == [tmp_path / image]
    assert source[0].size == (4, 5)
    assert len(source.faults) == 4


def test_the_folder_of_images_is_that_which_holds_most(tmp_path):
    for place in ("annotations/1.png", "images/train/1.png", "images/train/2.png", "images/1.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(tmp_path / place)
    images = [{"id": i, "file_name": f"{i}.png", "width": 5, "height": 4} for i in (1, 2)]
    (tmp_path / "annotations" / "train.json").write_text(json.dumps({"images": images}))
    assert CocoFile(tmp_path / "annotations" / "train.json").images == tmp_path / "images" / "train"
    with pytest.raises(FileNotFoundError, match="gone"):
        CocoFile(tmp_path / "annotations" / "train.json", images=tmp_path / "gone")


@pytest.mark.parametrize(
    ("told", "is_crowd"), [("0", False), ("1", True), (True, True), (None, False), (0.0, False)]
)
def test_crowds_may_be_told_as_text(coco, told, is_crowd):
    source = coco(annotation(iscrowd=told), categories=[{"id": 7, "name": "bar"}])
    assert source.faults == []
    assert source.entries[0].annotations[0].is_crowd is is_crowd


@pytest.mark.parametrize("is_upright", [False, True])
def test_images_on_their_head_are_told_as_those_on_their_side(tmp_path, is_upright):
    """A picture turned by half is as large either way, so that only others tell what boxes are of."""
    entries = []
    for number, (orientation, size) in enumerate([(3, (40, 30)), (6, (40, 30)), (8, (20, 20))]):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.new("RGB", size).save(tmp_path / f"{number}.jpg", exif=exif)
        width, height = size if not is_upright or orientation == 3 else size[::-1]
        entries.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 10, 5]} for i in range(3)]
    file = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "bar"}]}
    (tmp_path / "a.json").write_text(json.dumps(file))
    source = CocoFile(tmp_path / "a.json")
    found = [source[i].annotations[0].box for i in range(3)]
    turned = [(30.0, 25.0, 40.0, 30.0), (25.0, 0.0, 30.0, 10.0), (0.0, 10.0, 5.0, 20.0)]
    assert found == ([(0.0, 0.0, 10.0, 5.0)] * 3 if is_upright else turned)


def test_images_that_are_nowhere_are_refused_with_what_to_say(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "b.png"}]}))
    with pytest.raises(ValueError, match=r"no image of .*a\.json is in .*, such as b\.png; name the folder"):
        CocoFile(tmp_path / "a.json")
    (tmp_path / "empty.json").write_text('{"images": []}')
    assert len(CocoFile(tmp_path / "empty.json")) == 0


def test_a_place_names_the_file_the_image_and_its_id(coco, tmp_path):
    assert coco(image={"id": 5}).where(0) == f"{tmp_path / 'coco.json'}, image page.jpg (id 5)"
