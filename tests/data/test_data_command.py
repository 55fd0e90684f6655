"""`stepwell data`: what it prints, draws and refuses."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from stepwell import cli


@pytest.fixture
def coco(tmp_path):
    """coco(annotations, ...) -> the file, of a picture of 30 x 20 pixels."""

    def made(*annotations, pictures=1):
        Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
        images = [{"id": i, "file_name": "a.png", "width": 30, "height": 20} for i in range(pictures)]
        file = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "coco.json").write_text(json.dumps(file))
        return tmp_path / "coco.json"

    return made


GOOD = {"id": 7, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}
BAD = {**GOOD, "bbox": [1, 2, 0, 4]}


def test_a_summary_is_printed(coco, capsys):
    assert cli.main(["data", str(coco(GOOD))]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("1 picture, 1 object, 1 class\nclass  pictures  objects\ncat")
    assert printed.err == ""


def test_the_first_ten_faults_are_told_and_the_others_counted(coco, capsys):
    path = coco(GOOD, *[BAD] * 12)
    assert cli.main(["data", str(path)]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0] == f"left out, {path}, annotations[1], id 7: its bbox [1, 2, 0, 4] has no width"
    assert len(lines) == 11
    assert lines[-1] == "and 2 more"
    assert printed.out.endswith("left out: 12\n")


def test_json_holds_all_of_it(coco, capsys):
    assert cli.main(["data", str(coco(GOOD, *[BAD] * 12)), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (fields["pictures"], fields["objects"], len(fields["faults"])) == (1, 1, 12)
    assert fields["classes"] == [{"name": "cat", "pictures": 1, "objects": 1, "pixels": 0}]


def test_samples_are_drawn_to_a_file(coco, tmp_path, capsys):
    path, sheet = coco(GOOD, pictures=20), tmp_path / "sheet.png"
    sizes = []
    for options in ([], ["--samples", "4"], ["--samples", "4", "--seed", "3"]):
        assert cli.main(["data", str(path), "--show", str(sheet), *options]) == 0
        with Image.open(sheet) as image:
            sizes.append(image.size)
    assert sizes[0][1] > 3 * sizes[1][1] > 0
    assert sizes[1] == sizes[2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "coco.json", "sheet.png"]
    assert capsys.readouterr().err == ""


def test_a_picture_that_cannot_be_drawn_is_told_too(coco, tmp_path, capsys):
    path = coco(GOOD)
    Image.new("RGB", (30, 20)).save(tmp_path / "b.jpg")
    file = json.loads(path.read_text())
    file["images"].append({"id": 1, "file_name": "b.jpg", "width": 30, "height": 20})
    file["images"].append({"id": 2, "file_name": "c.jpg", "width": 30, "height": 20})
    path.write_text(json.dumps(file))
    raw = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(raw[: raw.index(b"\xff\xda") + 14])
    assert cli.main(["data", str(path), "--show", str(tmp_path / "s.png")]) == 0
    told = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"left out, {path}, image {name}" for name in ("c.jpg (id 2)", "b.jpg (id 1)")]


def test_the_folder_of_images_and_the_split_are_passed_on(coco, tmp_path, capsys):
    path = coco(GOOD)
    (tmp_path / "far").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "far/a.png")
    assert cli.main(["data", str(path)]) == 2
    assert cli.main(["data", str(path), "--images", str(tmp_path / "far")]) == 0
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "far/a.png").rename(tmp_path / "train/cat/a.png")
    path.unlink()
    capsys.readouterr()
    assert cli.main(["data", str(tmp_path), "--split", "train"]) == 0
    assert capsys.readouterr().out.startswith("1 picture, 1 class\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gone"], "no such file: {folder}/gone"),
        (["coco.json", "--show", "{folder}/x.gif"], "cannot write {folder}/x.gif: use a name that ends in"),
        (["coco.json", "--show", "{folder}/x/y.png"], "there is no folder {folder}/x"),
        (["coco.json", "--images", "{folder}/gone"], "does not exist"),
        (["coco.json", "--samples", "0"], "samples"),
        (["a.png"], "is no data set"),
        (["list.json"], "needs a list of classes"),
        (["broken.json"], "is not JSON"),
        (["empty.json", "--show", "{folder}/x.png"], "no sample can be drawn: there is none"),
    ],
)
def test_refusals_are_one_line(coco, tmp_path, capsys, arguments, complaint):
    coco(GOOD)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"images": []}')
    name, *options = [argument.format(folder=tmp_path) for argument in arguments]
    assert cli.main(["data", str(tmp_path / name), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint.format(folder=tmp_path) in line
    assert not (tmp_path / "x.png").exists()


def test_a_picture_of_the_data_is_not_drawn_over(coco, capsys):
    path = coco(GOOD)
    picture = path.with_name("a.png")
    before = picture.read_bytes()
    assert cli.main(["data", str(path), "--show", str(picture)]) == 2
    assert "a.png is one of the pictures, and would be written over" in capsys.readouterr().err
    assert picture.read_bytes() == before
    other = path.with_name("b.png")
    for _ in range(2):  # a drawing may be drawn anew
        assert cli.main(["data", str(path), "--show", str(other)]) == 0
