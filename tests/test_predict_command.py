"""`stepwell predict`: pictures of all kinds in, tables, JSON, COCO files and drawings out."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stepwell
from stepwell import cli
from stepwell.commands.pictures import find_pictures
from stepwell.images.draw import check_unsigned
from stepwell.models.masks import CroppedMasks
from stepwell.models.predicting import Choice, Predicts
from stepwell.models.tiled import detect_in_tiles
from stepwell.ops.sliding_windows import Window

NAMES = ("cat", "dog")


class Finder(Predicts[stepwell.Detections], torch.nn.Module):
    """Finds a dog in the left half of every picture."""

    class_names = NAMES
    device = torch.device("cpu")
    calls: list[tuple[int, Choice]]

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def _predict_batch(self, images: Any, choice: Choice) -> list[stepwell.Detections]:
        self.calls.append((len(images), choice))
        return [self._left_half(image) for image in images]

    def _predict_tiled(self, image: Any, tiles: Any, choice: Choice, batch: int) -> stepwell.Detections:
        self.calls.append((batch, choice))
        self.tiles = tiles
        cut = tiles.cut((image.height, image.width), side=32)
        return detect_in_tiles(
            image, cut, lambda crops, _: [self._left_half(one) for one in crops], batch=batch
        )

    def _left_half(self, image: Any) -> stepwell.Detections:
        size, half = (image.height, image.width), image.width // 2
        crop = torch.ones(image.height, half, dtype=torch.bool)
        return stepwell.Detections(
            boxes=torch.tensor([[0.0, 0.0, half, image.height]]),
            scores=torch.tensor([0.875]),
            labels=torch.tensor([1]),
            class_names=NAMES,
            image_size=size,
            masks=CroppedMasks((crop,), (Window(0, 0, image.height, half),), size),
        )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Finder:
    """What loading gives; its folder is `model` in the current one, where `folder` holds three pictures and a
    text, and a picture lies beside it."""
    finder = Finder()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "stepwell_detector"}')
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for place, name in enumerate(("folder/b.png", "folder/a.JPG", "folder/inner/b.png", "c.png"), start=1):
        Image.new("RGB", (40 * place, 20), "white").save(tmp_path / name)
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepwell.weights.load.load", lambda *_, **__: finder)
    return finder


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert cli.main(["predict", *arguments, "--model", "model"]) == code
    out, err = capsys.readouterr()
    return out, err


def test_a_table_names_pictures_classes_scores_and_boxes(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    out, err = run(capsys, "c.png")
    assert out.splitlines() == [
        "c.png  1 dog, boxes and masks in 160 x 20 pixels",
        "  dog  0.875       0.0       0.0      80.0      20.0",
    ]
    assert err == ""


def test_folders_patterns_and_files_give_each_picture_once(model: Finder) -> None:
    inside = [str(Path("folder/a.JPG")), str(Path("folder/b.png")), str(Path("folder/inner/b.png"))]
    assert find_pictures(["folder"]) == inside
    assert find_pictures(["c.png", "folder", "c.png", "./c.png"]) == ["c.png", *inside]
    assert find_pictures(["folder/**/*.png"]) == ["folder/b.png", "folder/inner/b.png"]
    assert find_pictures(["*.png"]) == ["c.png"]
    assert find_pictures(["fold*"]) == inside
    assert find_pictures(["folder/notes.txt"]) == ["folder/notes.txt"]
    for name in ("._a.png", ".cache/a.png"):
        Path("folder", name).parent.mkdir(exist_ok=True)
        Path("folder", name).touch()
    assert find_pictures(["folder"]) == inside
    Path("[1].png").touch()
    assert find_pictures(["[1].png"]) == ["[1].png"]


def test_lines_of_json_come_picture_by_picture(capsys: pytest.CaptureFixture[str], model: Finder) -> None:
    out, _ = run(capsys, "folder", "c.png", "--jsonl", "--batch", "3")
    records = [json.loads(line) for line in out.splitlines()]
    assert [Path(record["image"]).name for record in records] == ["a.JPG", "b.png", "b.png", "c.png"]
    assert [record["image_size"] for record in records] == [[20, 80], [20, 40], [20, 120], [20, 160]]
    assert records[0]["objects"][0]["class"] == "dog"
    assert records[0]["objects"][0]["box"] == [0, 0, 40, 20]
    assert records[0]["objects"][0]["mask"]["size"] == [20, 80]
    assert [count for count, _ in model.calls] == [3, 1]


def test_options_reach_the_model(capsys: pytest.CaptureFixture[str], model: Finder) -> None:
    run(capsys, "c.png", "--threshold", "0.25", "--max-detections", "7")
    assert model.calls == [(1, Choice(threshold=0.25, most=7))]
    run(capsys, "c.png", "--tiles", "--tile-size", "40", "--tile-overlap", "0.5", "--tile-scale", "2")
    assert model.tiles == stepwell.Tiles(size=40, overlap=0.5, scale=2.0)
    run(capsys, "c.png", "--tiles", "--batch", "5")
    assert model.tiles == stepwell.Tiles()
    assert model.calls[-1][0] == 5


def test_one_list_of_json_and_what_cannot_be_read_is_told_while_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    Path("cut.png").write_bytes(Path("c.png").read_bytes()[:40])
    names = ["folder/a.JPG", "cut.png", "gone.png", "folder/notes.txt", "https://a.org/b.png", "c.png"]
    out, err = run(capsys, *names, "--json", "--batch", "4", code=1)
    records = json.loads(out)
    assert [record["image"] for record in records] == names
    assert ["error" in record for record in records] == [False, True, True, True, True, False]
    lines = err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("stepwell: cut.png: damaged or unsupported PNG")
    assert lines[1] == "stepwell: gone.png: no such file"
    assert "network" in lines[3]
    assert lines[4] == "stepwell: 4 of 6 pictures could not be looked at"


def test_a_coco_file_that_this_library_and_coco_read(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    run(capsys, "folder", "gone.png", "--coco", "found.json", code=1)
    file = stepwell.CocoFile(Path("found.json"), images=Path())
    assert file.faults == []
    assert file.categories == {0: "cat", 1: "dog"}
    assert [image.size for image in file] == [(20, 80), (20, 40), (20, 120)]
    assert [image.annotations[0].box for image in file] == [(0, 0, half, 20) for half in (40, 20, 60)]
    content = json.loads(Path("found.json").read_text())
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    assert [one["id"] for one in content["annotations"]] == [1, 2, 3]
    assert content["annotations"][0]["segmentation"]["size"] == [20, 80]
    assert [path.name for path in Path().glob(".*")] == []


def test_drawings_have_names_of_their_own_and_no_draft_stays(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    run(capsys, "folder", "c.png", "--show", "deep/drawn")
    names = sorted(path.name for path in Path("deep/drawn").iterdir())
    assert names == ["a.png", "b-2.png", "b.png", "c.png"]
    with Image.open("deep/drawn/c.png") as drawn:
        pixels = np.array(drawn)
    assert pixels.shape == (20, 160, 3)
    assert (pixels[:, 90:] == 255).all()
    assert (pixels[:, :80] != 255).any()


def test_drawings_are_made_again_and_other_files_left_as_they_are(
    capsys: pytest.CaptureFixture[str], model: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "c.png", "--show", "drawn")
    first = Path("drawn/c.png").read_bytes()
    Path("drawn/c.png").write_bytes(first + b" ")  # still ours
    run(capsys, "c.png", "--show", "drawn")
    assert Path("drawn/c.png").read_bytes() == first
    Image.open("drawn/c.png").copy().save("other.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of a drawing, neither an error nor a warning
        check_unsigned([Path("drawn/c.png")])
    for content in (Path("other.png").read_bytes(), b"no picture", Path("folder/a.JPG").read_bytes()):
        Path("drawn/c.png").write_bytes(content)
        assert cli.main(["predict", "c.png", "--model", "model", "--show", "drawn"]) == 2
        assert "drawn/c.png is there, and no drawing" in capsys.readouterr().err
        assert Path("drawn/c.png").read_bytes() == content


def test_drawings_of_pictures_with_the_longest_names(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    name = "\N{CYRILLIC SMALL LETTER A}" * 125
    for folder in ("x", "y"):
        Path(folder).mkdir()
        Image.new("RGB", (8, 8)).save(Path(folder, f"{name}.png"))
    run(capsys, "x", "y", "--show", "drawn")
    assert len([*Path("drawn").iterdir()]) == 2


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are text there")
def test_a_drawing_of_a_picture_whose_name_is_no_text(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    name = os.fsdecode(b"caf\xe9")
    Path("c.png").rename(f"{name}.png")
    run(capsys, f"{name}.png", "--show", "drawn")
    assert [path.name for path in Path("drawn").iterdir()] == [f"{name}.png"]


def test_a_picture_on_standard_input(
    capsys: pytest.CaptureFixture[str], model: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("c.png").read_bytes())))
    out, _ = run(capsys, "-", "--show", "drawn")
    assert out.startswith("standard input  1 dog")
    assert Path("drawn/stdin.png").is_file()


def test_tiles_let_larger_pictures_in(capsys: pytest.CaptureFixture[str], model: Finder) -> None:
    Image.new("1", (8000, 5000)).save("large.png")
    _, err = run(capsys, "large.png", code=1)
    assert "--max-pixels 40000000" in err
    run(capsys, "large.png", "--max-pixels", "40000000")
    out, _ = run(capsys, "large.png", "--tiles", "--tile-size", "4000")
    assert "8000 x 5000" in out
    Image.new("1", (13000, 12000)).save("larger.png")
    _, err = run(capsys, "larger.png", "--tiles", code=1)
    assert "--max-pixels 156000000" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name pictures"),
        (["--model", "model"], "name pictures"),
        (["gone.png", "--model", "model"], "no such file: gone.png"),
        (["empty", "--model", "model"], "no pictures in empty"),
        (["no*match", "--model", "model"], "no such file: no*match"),
        (["-", "-", "--model", "model"], "more than once"),
        (["c.png", "--model", "model", "--json", "--jsonl"], "exclude each other"),
        (["c.png", "--model", "model", "--tile-scale", "2"], "add --tiles"),
        (["c.png", "--model", "model", "--tiles", "--tile-overlap", "1"], "above 0 and up to 0.9"),
        (["c.png", "--model", "model", "--coco", "nowhere/found.json"], "there is no folder nowhere"),
        (["c.png", "--model", "model", "--threshold", "2"], "--threshold"),
        (["c.png", "--model", "model", "--device", "toaster"], "unknown device toaster"),
        (["c.png", "--model", "nonsense"], "unknown model nonsense"),
        (["c.png", "--model", "model", "--show", "c.png"], "--show"),
        (["c.png", "--model", "model", "--show", "."], "c.png is one of the pictures"),
        (["./c.png", "--model", "model", "--coco", "c.png"], "c.png is one of the pictures"),
        (["folder", "c.png", "--model", "model", "--show", "link"], "link/b.png is one of the pictures"),
    ],
)
def test_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str], model: Finder, arguments: list[str], reason: str
) -> None:
    Path("empty").mkdir()
    Path("link").symlink_to("folder")
    before = {path: path.read_bytes() for path in Path().rglob("*.png")}
    assert cli.main(["predict", *arguments]) == 2
    assert {path: path.read_bytes() for path in Path().rglob("*.png")} == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stepwell: ")
    assert err.count("\n") == 1
    assert reason in err


def test_drawings_may_lie_beside_pictures_that_they_leave_alone(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    run(capsys, "folder/a.JPG", "--show", "folder")
    assert Path("folder/a.png").is_file()


def test_what_holds_no_picture_is_told_beside_one_that_does(
    capsys: pytest.CaptureFixture[str], model: Finder
) -> None:
    Path("empty").mkdir()
    out, err = run(capsys, "c.png", "empty", "em*y", code=1)
    assert out.startswith("c.png  1 dog")
    lines = [
        "empty: a folder without pictures",
        "em*y: no such file",
        "2 of 3 pictures could not be looked at",
    ]
    assert err.splitlines() == [f"stepwell: {line}" for line in lines]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")])
def test_a_picture_for_which_memory_is_short_fails_alone(
    capsys: pytest.CaptureFixture[str], model: Finder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    find = model._predict_batch

    def short(images: Any, choice: Choice) -> list[stepwell.Detections]:
        if sum(image.width for image in images) > 130:
            raise error
        return find(images, choice)

    monkeypatch.setattr(model, "_predict_batch", short)
    out, err = run(capsys, "c.png", "folder", "--json", "--coco", "found.json", "--batch", "2", code=1)
    assert ["objects" in record for record in json.loads(out)] == [False, True, True, True]
    assert len(json.loads(Path("found.json").read_text())["images"]) == 3
    assert err.splitlines()[0] == "stepwell: c.png: not enough memory to look at it"


def test_another_error_than_of_memory_is_no_fault_of_a_picture(
    capsys: pytest.CaptureFixture[str], model: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(images: Any, choice: Choice) -> list[stepwell.Detections]:
        raise ZeroDivisionError

    monkeypatch.setattr(model, "_predict_batch", fail)
    assert cli.main(["predict", "c.png", "--model", "model"]) == 1
    assert "a fault of stepwell" in capsys.readouterr().err


def test_a_model_that_answers_questions_predicts_nothing(
    capsys: pytest.CaptureFixture[str], model: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell.weights.load.load", lambda *_, **__: torch.nn.Identity())
    assert cli.main(["predict", "c.png", "--model", "model"]) == 2
    assert "model predicts nothing: it is a Identity" in capsys.readouterr().err
