"""Images with a map of the class of every pixel, and lists of classes."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stepwell.data.classes import ClassList, read_classes
from stepwell.data.label_maps import IGNORED, LabelMaps, ListedLabelMaps
from stepwell.images.open import open_image

COLOURS = ((60, 16, 152), (132, 41, 246), (110, 193, 228))
NAMES = ("building", "land", "road")
NUMBERS = np.random.default_rng(0).integers(0, 3, size=(6, 10))


@pytest.fixture
def folders(tmp_path):
    """folders(map, name=..., orientation=...) -> where an image of 10 x 6 pixels and its map lie."""

    def made(labels, name="a.png", orientation=1, image=(10, 6), image_name="a.jpg"):
        for folder in ("images/x", "labels/x"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.new("RGB", image).save(tmp_path / "images/x" / image_name, exif=exif)
        labels.save(tmp_path / "labels/x" / name)
        return tmp_path / "images", tmp_path / "labels"

    return made


def gray(numbers, mode="L"):
    return Image.fromarray(numbers.astype({"L": np.uint8, "I;16": np.uint16}[mode]))


def palette(numbers):
    image = gray(numbers).convert("P")
    image.putdata(numbers.flatten().tolist())
    image.putpalette([value for colour in COLOURS[::-1] for value in colour])
    return image


def coloured(numbers, colours=COLOURS):
    return Image.fromarray(np.array(colours, dtype=np.uint8)[numbers])


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (gray(NUMBERS), "a.png"),
        (gray(NUMBERS), "a.tif"),
        (gray(NUMBERS, "I;16"), "a.png"),
        (palette(NUMBERS), "a.png"),
        (gray(NUMBERS).convert("RGB"), "a.bmp"),
        (gray(NUMBERS).convert("RGBA"), "a.png"),
    ],
)
def test_numbers_are_read_as_they_are_stored(folders, labels, name):
    images, maps = folders(labels, name)
    source = LabelMaps(images, maps, classes=NAMES)
    assert len(source) == 1
    assert source[0].image == images / "x" / "a.jpg" == type(images)(source.where(0))
    assert np.array_equal(source[0].labels, NUMBERS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_list(folders, mode):
    """A palette's colours say nothing: its numbers do."""
    labels = coloured(NUMBERS).convert(mode) if mode != "P" else palette(NUMBERS)
    source = LabelMaps(*folders(labels), classes=ClassList(names=NAMES, colours=COLOURS))
    assert np.array_equal(source[0].labels, NUMBERS)


def test_what_is_ignored_gets_one_label(folders):
    numbers = np.array([[7, 8, 0, 255, 11] * 2] * 6)
    classes = ClassList(names=("road", "building"), numbers=(7, 11), ignore=(0, 8, 255))
    labels = LabelMaps(*folders(gray(numbers)), classes=classes)[0].labels
    assert labels[0, :5].tolist() == [0, IGNORED, IGNORED, IGNORED, 1]
    black = ClassList(names=NAMES, colours=COLOURS, ignore=((0, 0, 0),))
    stored = coloured(NUMBERS, ((0, 0, 0), *COLOURS[1:]))
    labels = LabelMaps(*folders(stored), classes=black)[0].labels
    assert np.array_equal(labels, np.where(NUMBERS == 0, IGNORED, NUMBERS))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_map_is_turned_with_its_image(folders, orientation):
    """As Pillow turns an image in which the numbers are the pixels."""
    images, maps = folders(gray(NUMBERS), orientation=orientation)
    exif = Image.Exif()
    exif[0x112] = orientation
    gray(NUMBERS).save(images.parent / "turned.png", exif=exif)
    expected = np.asarray(open_image(images.parent / "turned.png"))[..., 0]
    sample = LabelMaps(images, maps, classes=NAMES)[0]
    assert np.array_equal(sample.labels, expected)
    assert sample.labels.shape[::-1] == open_image(sample.image).size


def test_a_map_drawn_on_the_upright_image_stays(folders):
    images, maps = folders(gray(NUMBERS), orientation=6, image=(6, 10))
    assert np.array_equal(LabelMaps(images, maps, classes=NAMES)[0].labels, NUMBERS)


def test_of_an_image_on_its_head_the_map_is_as_those_of_images_on_their_side(folders):
    folders(gray(NUMBERS), name="head.png", orientation=3, image_name="head.jpg")
    images, maps = folders(gray(NUMBERS.T), name="side.png", orientation=6, image_name="side.jpg")
    source = LabelMaps(images, maps, classes=NAMES)
    assert np.array_equal(source[0].labels, NUMBERS)
    gray(NUMBERS).save(maps / "x/side.png")
    assert np.array_equal(LabelMaps(images, maps, classes=NAMES)[0].labels, NUMBERS[::-1, ::-1])


@pytest.mark.parametrize(
    ("labels", "classes", "complaint"),
    [
        (gray(NUMBERS + 3), NAMES, "holds 3, which is of no class"),
        (gray(NUMBERS[:, :9]), NAMES, r"a\.tif has 9 x 6 pixels, its image 10 x 6"),
        (coloured(NUMBERS), NAMES, "a map of colours, and the list of classes tells none"),
        (
            coloured(NUMBERS, ((1, 2, 3), *COLOURS[1:])),
            ClassList(names=NAMES, colours=COLOURS),
            r"holds \(1, 2, 3\), which is of no class",
        ),
        (Image.new("RGBA", (10, 6)), NAMES, "transparent"),
        (Image.fromarray(NUMBERS.astype(np.float32) + 0.5), NAMES, "whole numbers, and this one fractions"),
    ],
)
def test_a_map_that_does_not_fit_says_why(folders, labels, classes, complaint):
    source = LabelMaps(*folders(labels, "a.tif"), classes=classes)
    with pytest.raises(ValueError, match=complaint) as refusal:
        source[0]
    assert str(source.entries[0][1]) in str(refusal.value)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_read_as_it_is_stored(folders, bits):
    """Written by hand: Pillow writes no such PNG."""
    rows = b"".join(
        b"\0"
        + int("".join(f"{n:0{bits}b}" for n in row).ljust(-(-10 * bits // 8) * 8, "0"), 2).to_bytes(
            -(-10 * bits // 8)
        )
        for row in NUMBERS.tolist()
    )
    images, maps = folders(gray(NUMBERS))
    png = b"\x89PNG\r\n\x1a\n"
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 10, 6, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        png += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (maps / "x/a.png").write_bytes(png)
    assert np.array_equal(LabelMaps(images, maps, classes=NAMES)[0].labels, NUMBERS)


def test_what_is_ignored_is_no_class():
    with pytest.raises(ValueError, match="every class needs a number of its own, which is not ignored"):
        ClassList(names=NAMES, ignore=(0,))


def test_names_may_end_otherwise(folders):
    images, maps = folders(gray(NUMBERS), "a_gtFine_labelIds.png")
    (images / "x/a.jpg").rename(images / "x/a_leftImg8bit.jpg")
    gray(NUMBERS).save(maps / "x/a_gtFine_color.png")
    endings = {"image_ending": "_leftImg8bit", "label_ending": "_gtFine_labelIds"}
    source = LabelMaps(images, maps, classes=NAMES, **endings)
    assert (len(source), source.faults) == (1, [])


def test_what_has_no_partner_is_named_and_left_out(folders):
    images, maps = folders(gray(NUMBERS))
    gray(NUMBERS).save(images / "b.png")
    gray(NUMBERS).save(maps / "c.png")
    source = LabelMaps(images, maps, classes=NAMES)
    assert len(source) == 1
    assert source.faults == [
        (str(images / "b.png"), "it has no map"),
        (str(maps / "c.png"), "it is of no image"),
    ]
    with pytest.raises(ValueError, match=r"no image in .* has a map of its name"):
        LabelMaps(images, maps, classes=NAMES, image_ending="b")


def test_of_files_of_one_name_the_first_is_taken_and_the_others_named(folders):
    images, maps = folders(gray(NUMBERS))
    gray(NUMBERS).save(images / "x/a.png")
    source = LabelMaps(images, maps, classes=NAMES)
    assert source.entries == [(images / "x/a.jpg", maps / "x/a.png")]
    assert source.faults == [(str(images / "x/a.png"), "a.jpg has its name, by which images find their maps")]


def test_an_image_is_not_its_own_map(folders):
    maps = folders(gray(NUMBERS))[1]
    with pytest.raises(ValueError, match=r"a\.png would be its own map: images and maps are in one folder"):
        LabelMaps(maps, maps, classes=NAMES)
    gray(NUMBERS).save(maps / "x/a_mask.png")
    source = LabelMaps(maps, maps, classes=NAMES, label_ending="_mask")
    assert source.entries == [(maps / "x/a.png", maps / "x/a_mask.png")]


def test_more_classes_than_labels_are_refused(folders):
    with pytest.raises(ValueError, match="labels have room for 255 classes, got 256"):
        LabelMaps(*folders(gray(NUMBERS)), classes=ClassList(names=tuple(map(str, range(256))), ignore=()))


@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_list_pairs_images_with_maps(folders, form):
    images, _ = folders(gray(NUMBERS), "b.png")
    pair = {"image": "images/x/a.jpg", "label": "labels/x/b.png", "tile": 1}
    path = images.parent / "train.json"
    path.write_text(json.dumps([pair] * 2) if form == "list" else f"{json.dumps(pair)}\n" * 2)
    path = path if form == "list" else path.rename(path.with_suffix(".jsonl"))
    source = ListedLabelMaps(path, classes=NAMES)
    assert (len(source), source.faults) == (2, [])
    assert source[1].image == images / "x/a.jpg"
    assert np.array_equal(source[1].labels, NUMBERS)
    assert source.where(1) == f"{path}, {images / 'x/a.jpg'}"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (7, "no object of the form"),
        ([], "no object of the form"),
        ({"image": "images/x/a.jpg"}, "no object of the form"),
        ({"image": 3, "label": "labels/x/a.png"}, "no object of the form"),
        ({"image": "", "label": "labels/x/a.png"}, "no object of the form"),
        ({"image": "images/x/a.jpg", "label": "gone.png"}, "there is no file"),
        ({"image": "gone.jpg", "label": "labels/x/a.png"}, "there is no file"),
        ({"image": "\0", "label": "labels/x/a.png"}, "there is no file"),
        ({"image": "x" * 999, "label": "labels/x/a.png"}, "there is no file"),
    ],
)
def test_an_entry_of_a_list_that_is_no_pair_is_named_and_left_out(folders, entry, complaint):
    images, _ = folders(gray(NUMBERS))
    path = images.parent / "train.json"
    path.write_text(json.dumps([{"image": "images/x/a.jpg", "label": "labels\\x\\a.png"}, entry]))
    source = ListedLabelMaps(path, classes=NAMES)
    assert len(source) == 1
    assert np.array_equal(source[0].labels, NUMBERS)
    ((where, reason),) = source.faults
    assert where == f"{path}, entry 1"
    assert complaint in reason
    path.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=rf"lists no image with its map of labels: .*{complaint}"):
        ListedLabelMaps(path, classes=NAMES)


def test_an_empty_list_is_refused(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"lists no image with its map of labels$"):
        ListedLabelMaps(tmp_path / "train.json", classes=NAMES)


LISTED = ClassList(names=NAMES)
NUMBERED = ClassList(names=NAMES, numbers=(0, 1, 2))
COLOURED = ClassList(names=NAMES, colours=COLOURS)
BOTH = ClassList(names=NAMES, numbers=(1, 2, 3), colours=COLOURS)


@pytest.mark.parametrize(
    ("name", "content", "classes"),
    [
        ("a.json", list(NAMES), NUMBERED),
        ("a.json", {"0": "building", "1": "land", "2": "road"}, NUMBERED),
        ("a.json", {"classes": [{"id": i, "name": name} for i, name in enumerate(NAMES)]}, NUMBERED),
        (
            "a.json",
            {
                "ignore_index": 9,
                "classes": [
                    {"id": 9, "name": "none", "color": [0, 0, 0]},
                    *({"id": i + 1, "name": n, "color": list(COLOURS[i])} for i, n in enumerate(NAMES)),
                ],
            },
            ClassList(names=NAMES, numbers=(1, 2, 3), colours=COLOURS, ignore=(9, (0, 0, 0))),
        ),
        ("a.txt", "building\nland\n\nroad\n", LISTED),
        ("a.txt", "\ufeffbuilding\r\nland\r\nroad", LISTED),
        ("a.txt", "# R G B\n60 16 152\tbuilding\n132 41 246 land\n110 193 228 road", COLOURED),
        ("a.txt", "60 16 152 7\n1 2 3 8", ClassList(names=("7", "8"), colours=((60, 16, 152), (1, 2, 3)))),
        ("a.csv", "name,r,g,b\nbuilding, 60, 16, 152\nland,132,41,246\nroad,110,193,228\n", COLOURED),
        ("a.csv", "id,name,r,g,b\n1,building,60,16,152\n2,land,132,41,246\n3,road,110,193,228\n", BOTH),
        (
            "a.csv",
            '"R";"G";"B";"Class"\n60;16;152;building\n132;41;246;land\n110;193;228;road',
            COLOURED,
        ),
        ("a.csv", "index,label\n1,building\n2,land\n3,road", replace(BOTH, colours=())),
        ("a.csv", 'name,id\n"a, b",0\nc,1', ClassList(names=("a, b", "c"), numbers=(0, 1))),
        ("a.txt", "name plate\nroad sign\n", ClassList(names=("name plate", "road sign"))),
        ("a.txt", "id name r g b\r\n1 building 60 16 152\r\n2 land 132 41 246\r\n3 road 110 193 228", BOTH),
        ("a.txt", "1 60 16 152 building\n2 132 41 246 land\n3 110 193 228 road", BOTH),
        ("a.txt", "1 building 60 16 152\n2 land 132 41 246\n3 road 110 193 228", BOTH),
        ("a.json", {"building": 1, "land": 2, "road": 3}, replace(BOTH, colours=())),
    ],
)
def test_lists_of_classes_as_people_keep_them(tmp_path, name, content, classes):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    assert read_classes(tmp_path / name) == classes


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "", "a list of classes is empty"),
        ("a.txt", "60 16 152 a\nb\n1 2 3 c\n4 5 6 d", "4 classes have 3 colours"),
        ("a.txt", "60 16 152 a\n60 16 152 b", "every class needs a colour of its own"),
        ("a.txt", "background\n1 2 3 road\n4 5 6 land", "3 classes have 2 colours"),
        ("a.txt", "1 2 300 road", "a colour is three numbers of 0 to 255"),
        (
            "a.json",
            '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]',
            "every class needs a number of its own",
        ),
        ("a.json", '[{"id": 1}]', "name"),
        ("a.json", '[{"id": 1e400, "name": "a"}]', "infinity"),
        ("a.json", "3", "int"),
        ("a.json", '[["a", 0]]', "is no name, and no object with one"),
        (
            "a.json",
            '[{"name": "a", "color": [1, 2, 3, 255]}]',
            "the colour of 'a' is .*, not red",
        ),
        ("a.csv", "id,name,r,g,b\n1,a,2", "the line '1,a,2' has fewer columns than the header"),
        ("a.json", "{", "not JSON"),
    ],
)
def test_what_is_no_list_of_classes_is_refused_with_its_name(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name[:1]}\.{name[2:]} is no list of classes: .*{complaint}"):
        read_classes(tmp_path / name)
