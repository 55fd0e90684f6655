"""YOLO data sets as people have them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stepwell.data.yolo import YoloFiles
from stepwell.images.open import open_image

NAMES = "names: [cat, dog]\n"
BAR = "1 0.375 0.4375 0.41666667 0.125"  # pixels (20, 30) to (70, 40) of 120 x 80


@pytest.fixture
def folder(tmp_path):
    """folder({image: lines, ...}, yaml) -> the data set's folder; lines of None are no label file."""

    def made(files, settings=None, orientation=1):
        for name, lines in files.items():
            image, text = tmp_path / "images" / name, (tmp_path / "labels" / name).with_suffix(".txt")
            for path in (image, text):
                path.parent.mkdir(parents=True, exist_ok=True)
            page = Image.new("RGB", (120, 80), "white")
            ImageDraw.Draw(page).rectangle((20, 30, 69, 39), fill="black")
            exif = Image.Exif()
            exif[0x112] = orientation
            page.save(image, exif=exif)
            if lines is not None:
                text.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        if settings is None:
            (tmp_path / "classes.txt").write_text("cat\ndog\n")
        else:
            (tmp_path / "data.yaml").write_text(settings)
        return tmp_path

    return made


def boxes(source, index=0):
    return [np.round(one.box, 3).tolist() for one in source[index].annotations]


def test_boxes_are_corners_in_pixels_with_what_is_in_them(folder):
    source = YoloFiles(folder({"a.png": f"{BAR}\n0 0.5 0.5 1 1\n"}))
    page = source[0]
    assert (len(source), page.path.name, page.size) == (1, "a.png", (80, 120))
    assert boxes(source) == [[20, 30, 70, 40], [0, 0, 120, 80]]
    assert [(one.label, one.category, one.is_crowd) for one in page.annotations] == [
        (1, 1, False),
        (0, 0, False),
    ]
    assert (source.classes, source.category_ids, source.faults) == (("cat", "dog"), (0, 1), [])
    assert source.where(0) == str(page.path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_fractions_are_of_the_upright_image(folder, orientation):
    files = {"a.png": "0 0.5 0.5 1 0.5"}
    height, width = YoloFiles(folder(files, orientation=orientation))[0].size
    assert (width, height) == open_image(folder(files, orientation=orientation) / "images/a.png").size
    assert boxes(YoloFiles(folder(files, orientation=orientation))) == [
        [0, height / 4, width, height * 3 / 4]
    ]


def test_polygons_are_masks_with_the_box_around_them(folder):
    source = YoloFiles(folder({"a.png": "0 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.5"}))
    (thing,) = source[0].annotations
    assert thing.box == (30, 20, 90, 40)
    expected = np.zeros((80, 120), dtype=bool)
    expected[20:40, 30:90] = True
    assert np.array_equal(thing.mask.pixels(), expected)
    assert YoloFiles(folder({"a.png": BAR}))[0].annotations[0].mask is None


@pytest.mark.parametrize("points", ["0.1 0.1 0.9 0.9", "0.1 0.1 2 0.9 0.9 0"])
def test_of_poses_the_boxes_are_read(folder, points):
    settings = f"{NAMES}train: images\nkpt_shape: [2, {len(points.split()) // 2}]\n"
    source = YoloFiles(folder({"a.png": f"{BAR} {points}"}, settings))
    assert (boxes(source), source[0].annotations[0].mask, source.faults) == ([[20, 30, 70, 40]], None, [])


def test_what_reaches_past_the_image_is_cut_at_its_edge(folder):
    lines = "0 0 0.5 0.5 1.005\n0 -0.005 0 1.01 0 1 1 0 1"
    assert boxes(YoloFiles(folder({"a.png": lines}))) == [[0, 0, 30, 80], [0, 0, 120, 80]]


@pytest.mark.parametrize("lines", [None, "", "\n \r\n"])
def test_images_without_labels_are_empty_pictures(folder, lines):
    source = YoloFiles(folder({"a.png": BAR, "b.png": lines}))
    assert [len(source[i].annotations) for i in range(2)] == [1, 0]
    assert source.faults == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lines_of_windows_are_lines(folder, encoding):
    source = YoloFiles(folder({"a.png": f"\r\n{BAR}\r\n\r\n{BAR}".encode(encoding)}))
    assert boxes(source) == [[20, 30, 70, 40]] * 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0", "behind its class are 0 numbers"),
        ("0 0.5 0.5 0.1", "behind its class are 3 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "behind its class are 5 numbers"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.3", "behind its class are 7 numbers"),
        ("2 0.5 0.5 0.1 0.1", "its class is 2, which is of no name"),
        ("-1 0.5 0.5 0.1 0.1", "its class is -1, which is of no name"),
        ("0.5 0.5 0.5 0.1 0.1", "its class is 0.5, which is of no name"),
        ("nan 0.5 0.5 0.1 0.1", "its class is nan, which is of no name"),
        ("cat 0.5 0.5 0.1 0.1", "it holds what is no number"),
        ("0 0.5 0.5 0.1 0,1", "it holds what is no number"),
        ("0 60 40 10 10", "no fractions of the image"),
        ("0 0.5 0.5 1.2 0.1", "no fractions of the image"),
        ("0 -0.5 0.5 0.2 0.1", "no fractions of the image"),
        ("0 0.5 nan 0.2 0.1", "no fractions of the image"),
        ("0 0.5 0.5 inf 0.1", "no fractions of the image"),
        ("0 0.5 0.5 0 0.1", "its box has no area"),
        ("0 0.5 0.5 0.1 0", "its box has no area"),
        ("0 0.5 0.5 -0.005 0.1", "its box has no area"),
        ("0 0.1 0.1 0.1 0.2 0.1 0.3", "its polygon has no area"),
        ("\udcff 0.5 0.5 0.1 0.1", "it holds what is no number"),
    ],
)
def test_a_bad_line_is_named_and_left_out(folder, line, complaint):
    root = folder({"a.png": f"\n{BAR}\n{line}\n{BAR}\n".encode("utf-8", "surrogateescape")})
    source = YoloFiles(root)
    assert len(source[0].annotations) == 2
    ((where, reason),) = source.faults
    assert where == f"{root / 'labels/a.txt'}, line 3"
    assert complaint in reason


def test_a_label_file_that_is_no_text_is_named(folder):
    source = YoloFiles(folder({"a.png": BAR, "b.png": BAR.encode("utf-16")[:-1]}))
    assert [len(source[i].annotations) for i in range(2)] == [1, 0]
    assert source.faults[0][0].endswith("b.txt")


def test_a_label_file_of_no_image_is_named(folder):
    root = folder({"x/a.png": BAR})
    (root / "labels/x/gone.txt").write_text(BAR)
    for name in ("labels/classes.txt", "labels/x/classes.txt"):  # as labelImg leaves them
        (root / name).write_text("cat\ndog\n")
    assert YoloFiles(root).faults == [(str(root / "labels/x/gone.txt"), "it is of no image")]


def test_a_split_of_a_folder_is_a_folder_in_it(folder):
    root = folder({"train/a.png": BAR, "val/b.png": BAR, "val/c.png": BAR})
    assert [len(YoloFiles(root, split=split)) for split in (None, "train", "val")] == [3, 1, 2]
    with pytest.raises(ValueError, match=r"there is no folder .*images/test"):
        YoloFiles(root, split="test")


def test_yes_and_no_are_names(folder):
    root = folder({"a.png": BAR}, "train: images\nnames: [no, yes, on, 7, true]\n")
    assert YoloFiles(root).classes == ("no", "yes", "on", "7", "true")


@pytest.mark.parametrize(
    "settings",
    [
        "train: images/train\nval: images/val\n",
        "path: .\ntrain: images/train\nval: [images/val]\n",
        "path: /nowhere/data\ntrain: ./images/train\nval: images/val\n",
        "train: ../images/train\nval: ../images/val\n",
        "train: images\\train\nval: images/val/\n",
    ],
)
@pytest.mark.parametrize("names", [NAMES, "names: {1: dog, 0: cat}\n", "names:\n  0: cat\n  1: dog\nnc: 2\n"])
def test_a_yaml_file_names_splits_and_classes(folder, settings, names):
    root = folder({"train/a.png": BAR, "val/b.png": BAR, "val/c.png": None}, settings + names)
    for path in (root / "data.yaml", root):
        assert [len(YoloFiles(path, split=split)) for split in (None, "train", "val")] == [1, 1, 2]
        assert YoloFiles(path).classes == ("cat", "dog")


def test_a_split_may_be_a_list_of_images_and_several_folders(folder):
    root = folder({"a.png": BAR, "b.png": BAR, "x/c.png": BAR}, f"train: train.txt\nval: [images/x]\n{NAMES}")
    (root / "train.txt").write_text("./images/b.png\r\n\nimages\\a.png\nimages/gone.png\n")
    source = YoloFiles(root / "data.yaml")
    assert [path.name for path in source.files] == ["b.png", "a.png", "gone.png"]
    assert boxes(source, 1) == [[20, 30, 70, 40]]
    with pytest.raises(FileNotFoundError):
        source[2]
    assert source.faults == []


def test_labels_lie_beside_images_that_are_in_no_folder_images(folder):
    root = folder({"a.png": BAR}, f"train: data\n{NAMES}")
    (root / "data").mkdir()
    (root / "images/a.png").rename(root / "data/a.png")
    (root / "labels/a.txt").rename(root / "data/a.txt")
    assert boxes(YoloFiles(root)) == [[20, 30, 70, 40]]
    (root / "data").rename(root / "images/data")
    (root / "data.yaml").write_text(f"train: images/data\n{NAMES}")
    assert boxes(YoloFiles(root)) == [[20, 30, 70, 40]]


def test_class_numbers_may_have_gaps(folder):
    source = YoloFiles(
        folder({"a.png": "7 0.5 0.5 1 1\n5 0.5 0.5 1 1"}, "train: images\nnames: {7: b, 5: 3}\n")
    )
    assert (source.classes, source.category_ids) == (("3", "b"), (5, 7))
    assert [(one.category, one.label) for one in source[0].annotations] == [(7, 1), (5, 0)]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("", "must be a mapping with names, train and val"),
        ("[1]", "must be a mapping with names, train and val"),
        ("names: [", "is not YAML"),
        ("names: !!timestamp x", "is not YAML"),
        ("names: !!python/object:os.system x", "is not YAML"),
        ("? [1]\n: 2", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("train: images", "it has no names"),
        ("train: images\nnames: []", "it has no names"),
        ("train: images\nnames: cat", "it has no names"),
        ("train: images\nnames: {a: cat}", "keys that are no numbers from 0 on"),
        ("train: images\nnames: {-1: cat}", "keys that are no numbers from 0 on"),
        (f"val: images\n{NAMES}", "has no split train; it names images of val"),
        (f"path: x\n{NAMES}", "has no split train; it names images of none"),
        (f"train: 3\n{NAMES}", "has no split train"),
        (f"train: [3]\n{NAMES}", "has no split train"),
        (f"train: []\n{NAMES}", "has no split train"),
        (f"train: pictures\n{NAMES}", "names images in pictures, which is not in"),
        (f'train: "\\0"\n{NAMES}', "names images in"),
        (f"train: {'x' * 999}\n{NAMES}", "names images in"),
    ],
)
def test_what_is_no_data_set_is_refused(folder, settings, complaint):
    root = folder({"a.png": BAR}, settings)
    with pytest.raises(ValueError, match=complaint) as refusal:
        YoloFiles(root / "data.yaml")
    assert "data.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_that_names_no_classes_or_several_is_refused(folder):
    root = folder({"a.png": BAR})
    (root / "classes.txt").rename(root / "labels/classes.txt")
    assert YoloFiles(root).classes == ("cat", "dog")
    (root / "labels/classes.txt").unlink()
    with pytest.raises(ValueError, match=r"put a name a line into .*classes\.txt"):
        YoloFiles(root)
    for name in ("a.yaml", "b.yml"):
        (root / name).write_text("names: [a]")
    with pytest.raises(ValueError, match=r"several YAML files; name one of them, such as .*a\.yaml"):
        YoloFiles(root)


def test_images_of_which_none_has_labels_are_refused(folder):
    with pytest.raises(ValueError, match=r"no image of .* has labels: there is no .*labels/a\.txt"):
        YoloFiles(folder({"a.png": None}))


def test_a_polygon_too_long_to_draw_spoils_its_image(folder):
    root = folder({"a.png": "0 " + "0 0 1 1 " * 5000, "b.png": BAR})
    Image.new("RGB", (1000, 1000)).save(root / "images/a.png")
    source = YoloFiles(root)
    assert len(source[1].annotations) == 1
    with pytest.raises(ValueError, match="reaches over more than"):
        source[0]
