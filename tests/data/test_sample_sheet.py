"""A sheet of samples: what is drawn where, in which colour."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from stepwell.data.classes import ClassList
from stepwell.data.coco import CocoFile
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps
from stepwell.data.sheet import NO_CLASS, PANEL_HEIGHT, PANEL_WIDTH, draw_samples
from stepwell.images.draw import class_colours
from stepwell.views.panels import CAPTION, MARGIN

TOP = MARGIN + CAPTION  # of the first row's pictures
CAT, DOG = class_colours(2)
WIDE = (2 * PANEL_WIDTH, PANEL_WIDTH - 1)  # pixels of a picture that is drawn at half its size


@pytest.fixture
def coco(tmp_path):
    """coco(annotations, size, ...) -> pictures of that size in grey, all with these annotations."""

    def made(*annotations, size=WIDE, pictures=1, categories=("cat", "dog")):
        images = []
        for number in range(pictures):
            Image.new("RGB", size, (50 + number, 50, 50)).save(tmp_path / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        marks = [{**one, "image_id": number} for number in range(pictures) for one in annotations]
        named = [{"id": i, "name": name} for i, name in enumerate(categories)]
        (tmp_path / "coco.json").write_text(
            json.dumps({"images": images, "annotations": marks, "categories": named})
        )
        return CocoFile(tmp_path / "coco.json")

    return made


def drawn(source, **options):
    sheet = draw_samples(source, **options)
    assert sheet.bad == ()
    return np.asarray(sheet.image).astype(int)


def at(pixels, x, y):
    """The colour at a place of the first picture."""
    return tuple(pixels[TOP + y, MARGIN + x])


def test_boxes_lie_where_they_are_in_the_picture(coco):
    """Many, so that only those are named in which the name has room; those under it are not."""
    boxes = [[60, 80, 20, 40], [300, 80, 8, 60], *([700, 300, 10, 10] for _ in range(7))]
    pixels = drawn(coco(*({"category_id": i % 2, "bbox": box} for i, box in enumerate(boxes))))
    for (left, top, width, height), colour in zip(boxes[:2], (CAT, DOG), strict=True):
        right, bottom = (left + width) // 2 - 1, (top + height) // 2 - 1
        for x, y in ((left // 2, top // 2), (right, top // 2), (left // 2, bottom), (right, bottom)):
            assert at(pixels, x, y) == colour
        assert at(pixels, left // 2 - 1, top // 2 + 3) == (50, 50, 50)
        assert at(pixels, right + 1, bottom) == (50, 50, 50)
        assert at(pixels, left // 2 + 1, top // 2 + 3) == (50, 50, 50)  # within


def test_few_boxes_are_named_and_of_many_those_with_room(coco):
    small = {"category_id": 0, "bbox": [400, 200, 10, 10]}
    large = {"category_id": 1, "bbox": [100, 200, 200, 10]}

    def is_named(pixels, x):
        return at(pixels, x, 85) in (CAT, DOG)  # above the box

    few, many = drawn(coco(small, large)), drawn(coco(*[small] * 8, large))
    assert [is_named(few, 50), is_named(few, 200)] == [True, True]
    assert [is_named(many, 50), is_named(many, 200)] == [True, False]


def test_names_at_the_edges_stay_in_the_picture(coco):
    pixels = drawn(coco({"category_id": 0, "bbox": [WIDE[0] - 4, 0, 4, 20]}))
    assert at(pixels, PANEL_WIDTH - 1, 0) == CAT
    assert at(pixels, PANEL_WIDTH - 6, 1) == CAT
    assert tuple(pixels[TOP - 2, MARGIN + PANEL_WIDTH - 1]) == (255, 255, 255)


def test_masks_are_half_their_colour(coco):
    mask = [[100, 100, 300, 100, 300, 200, 100, 200]]
    things = [{"category_id": 1, "bbox": [100, 100, 200, 100], "segmentation": mask}]
    things.append({"category_id": 0, "bbox": [500, 300, 100, 40]})
    pixels = drawn(coco(*things))
    half = tuple((50 + part) // 2 for part in DOG)
    for x, y in ((52, 70), (147, 97), (100, 75)):
        assert at(pixels, x, y) == half
    assert at(pixels, 48, 70) == at(pixels, 152, 97) == at(pixels, 270, 160) == (50, 50, 50)


def test_objects_of_no_category_and_crowds_are_drawn(coco):
    pixels = drawn(coco({"bbox": [100, 100, 50, 40]}, {"category_id": 0, "iscrowd": 1, "bbox": [0, 0, 8, 8]}))
    assert at(pixels, 50, 60) == NO_CLASS
    assert at(pixels, 0, 0) == CAT


def test_the_legend_tells_the_classes_that_are_drawn(coco):
    pixels = drawn(coco({"category_id": 1, "bbox": [100, 100, 50, 40]}))
    row = TOP + PANEL_WIDTH // 2 + MARGIN + 10
    assert tuple(pixels[row, MARGIN + 2]) == DOG
    assert CAT not in set(map(tuple, pixels[row]))


@pytest.mark.parametrize("size", [(800, 100), (100, 800), (30, 20), (190, 1), (1, 1)])
def test_pictures_keep_their_aspect(coco, size):
    pixels = drawn(coco(size=size))
    rows, cols = (pixels[TOP:] == 50).all(-1).nonzero()
    scale = min(PANEL_WIDTH / size[0], PANEL_HEIGHT / size[1])
    assert cols.max() - cols.min() + 1 == max(round(size[0] * scale), 1)
    assert rows.max() - rows.min() + 1 == max(round(size[1] * scale), 1)


def test_samples_are_drawn_by_chance_in_their_order(coco):
    source = coco(pictures=30)

    def shown(**options):
        pixels = drawn(source, **options)
        reds = pixels[(pixels[..., 1:] == 50).all(-1), 0]
        return [red - 50 for red in dict.fromkeys(reds.tolist()) if (reds == red).sum() > 1000]

    first = shown(samples=3)
    assert first == sorted(first) == shown(samples=3, seed=0)
    assert len(first) == 3
    assert shown(samples=3, seed=1) != first
    assert len(shown(samples=40)) == 30


def test_a_bad_sample_is_told_and_another_drawn(coco, tmp_path):
    source = coco(pictures=4)
    for number in (0, 2):
        raw = (tmp_path / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(raw[: raw.index(b"IDAT") + 6])
    sheet = draw_samples(source, samples=2)
    reds = set(np.asarray(sheet.image)[..., 0].flatten().tolist())
    assert {51, 53} <= reds
    assert {where for where, _ in draw_samples(source, samples=9).bad} == {source.where(0), source.where(2)}


def test_where_none_can_be_drawn_the_first_reason_is_told(coco, tmp_path):
    source = coco()
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"no sample can be drawn, .*image 0\.png \(id 0\): not an image"):
        draw_samples(source)
    with pytest.raises(ValueError, match="no sample can be drawn: there is none"):
        draw_samples(coco(pictures=0))


def test_maps_are_half_the_colours_of_the_list(tmp_path):
    colours = ((200, 0, 0), (0, 100, 0))
    labels = np.full((PANEL_WIDTH // 2, PANEL_WIDTH), 255, dtype=np.uint8)
    labels[:, :100], labels[:, 100:200] = 1, 0
    for folder, image in (("i", Image.new("RGB", labels.shape[::-1], (50, 50, 50))), ("l", labels)):
        (tmp_path / folder).mkdir()
        (image if folder == "i" else Image.fromarray(image)).save(tmp_path / folder / "a.png")
    classes = ClassList(names=("roof", "tree", "lake"), colours=(*colours, (1, 2, 3)), numbers=(0, 1, 2))
    pixels = drawn(LabelMaps(tmp_path / "i", tmp_path / "l", classes=classes))
    assert [at(pixels, x, 9) for x in (99, 100, 199, 200)] == [
        *((25, 75, 25), (125, 25, 25), (125, 25, 25), (50, 50, 50)),
    ]
    legend = set(map(tuple, pixels[TOP + PANEL_WIDTH // 2 + MARGIN + 10]))
    assert {*colours} <= legend
    assert (1, 2, 3) not in legend


def test_images_stand_under_their_class(tmp_path):
    """The same picture under another name: the captions differ and nothing else does."""
    sheets = []
    for name in ("cat", "dog"):
        (tmp_path / name / name).mkdir(parents=True)
        Image.new("RGB", (60, 40), (9, 9, 9)).save(tmp_path / name / name / "a.png")
        sheets.append(drawn(ImageFolder(tmp_path / name)))
    differ = (sheets[0] != sheets[1]).any(-1)
    assert differ[MARGIN:TOP].any()
    assert not differ[TOP:].any()


def test_classes_have_colours_of_their_own():
    colours = class_colours(30)
    assert len(set(colours)) == 30
    neighbours = np.abs(np.diff(np.array(colours), axis=0)).max(1)
    assert neighbours.min() > 60
    assert class_colours(1) == colours[:1]


def test_names_of_strangers_are_drawn(coco):
    things = [{"category_id": i, "bbox": [10, 10, 50, 40]} for i in range(3)]
    drawn(coco(*things, categories=("a\nb", "x" * 999, "\ud800字")))


def test_more_classes_than_the_legend_lists_are_counted(coco):
    things = [{"category_id": i, "bbox": [10, 10, 50, 40]} for i in range(45)]
    names = [f"class {i}" for i in range(45)]
    long, short = (drawn(coco(*things[:n], categories=names)) for n in (45, 41))
    assert long.shape == short.shape  # "and 5 more classes", "and 1 more classes"
