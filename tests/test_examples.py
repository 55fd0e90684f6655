"""Each example is short, runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

import stepwell

EXAMPLES = Path(__file__).parents[1] / "examples"
RECEIPT = str(EXAMPLES / "receipt.jpg")
HIT = 0.33  # the overlap of a hit, as the authors of DeepPCB count
BOARDS = {  # the annotations of DeepPCB: left, top, width, height
    "board_1.jpg": (
        ("open", 191, 312, 36, 31),
        ("short", 294, 351, 41, 38),
        ("mousebite", 147, 466, 38, 30),
        ("spur", 221, 523, 43, 31),
        ("copper", 464, 187, 36, 37),
        ("pin-hole", 216, 218, 26, 34),
        ("pin-hole", 154, 78, 38, 24),
        ("spur", 60, 103, 34, 28),
    ),
    "board_2.jpg": (
        ("open", 170, 111, 46, 33),
        ("short", 397, 94, 29, 46),
        ("mousebite", 154, 179, 43, 38),
        ("spur", 107, 244, 32, 36),
        ("copper", 465, 285, 47, 47),
        ("pin-hole", 244, 303, 42, 32),
        ("copper", 120, 420, 35, 35),
        ("mousebite", 171, 339, 37, 36),
        ("open", 275, 158, 41, 61),
    ),
}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """An example run as a program, with these arguments and in an empty folder; what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_under_sixty_lines_and_listed(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


def test_the_demo_prints_every_answer_beside_the_truth_and_draws_the_views(
    run: Callable[..., str], tmp_path: Path
) -> None:
    answers = re.findall(r"('.+') \(printed: ('.+')\)", run("demo.py"))
    assert len(answers) == 6
    assert all(answer == printed for answer, printed in answers)
    assert (tmp_path / "views.png").stat().st_size > 10_000


def test_the_boards_are_drawn_with_most_of_their_defects(run: Callable[..., str], tmp_path: Path) -> None:
    out = run("boards.py")
    for name, there in BOARDS.items():
        counts = sorted(Counter(kind for kind, *_ in there).items())
        assert f"(there are: {', '.join(f'{count} {kind}' for kind, count in counts)})" in out
        assert (tmp_path / f"{Path(name).stem}_found.png").stat().st_size > 10_000
        found = stepwell.load("boards_tiny").predict(EXAMPLES / name)
        boxes = torch.tensor(
            [[left, top, left + width, top + height] for _, left, top, width, height in there]
        )
        hits = box_iou(boxes.float(), found.boxes) > HIT
        kinds = torch.tensor([found.class_names.index(kind) for kind, *_ in there])
        right = (hits & (kinds[:, None] == found.labels)).any(1).sum()
        assert right >= len(there) - 2
        assert len(found.labels) <= len(there) + 2


def test_ask_and_pipeline_print_the_same_answer(run: Callable[..., str]) -> None:
    """Two ways to one model: ours, and transformers' own pipeline."""
    question = "How much is the total?"
    ours = run("ask.py", RECEIPT, question).strip()
    assert ours
    assert run("pipeline.py", RECEIPT, question).strip() == ours


def test_features_prints_views_maps_and_tokens(run: Callable[..., str]) -> None:
    kinds = {line.split()[0] for line in run("features.py", RECEIPT).splitlines()}
    assert kinds == {"view", "map", "visual"}


@pytest.mark.slow
def test_fine_tuning_prints_every_answer_beside_the_truth(run: Callable[..., str]) -> None:
    assert run("fine_tune.py", "1").count("(printed: ") == 4


@pytest.mark.slow
def test_a_model_from_parts_is_trained_and_asked(run: Callable[..., str], tmp_path: Path) -> None:
    out = run("own_parts.py", "1")
    assert "vision.branches.0 from vit" in out
    assert "language from llama" in out
    assert json.loads((tmp_path / "runs/mine/model/origin.json").read_text())["language"]["from"] == "llama"


def things(folder: Path) -> tuple[Path, Path]:
    """Two images of dark boxes, and a COCO file of them; a folder of a class each; maps of labels."""
    images, annotations = [], []
    for number, name in enumerate(("one", "two")):
        page = Image.new("RGB", (120, 90), "white")
        ImageDraw.Draw(page).rectangle((20, 30, 59, 49), fill="black")
        for place in (folder / "images", folder / "photos" / name):
            place.mkdir(parents=True, exist_ok=True)
            page.save(place / f"{number}.png")
        (folder / "labels").mkdir(exist_ok=True)
        page.convert("L").point(lambda value: value == 0).save(folder / f"labels/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 120, "height": 90})
        annotations.append({"id": number, "image_id": number, "category_id": 5, "bbox": [20, 30, 40, 20]})
    file = {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "box"}]}
    (folder / "coco.json").write_text(json.dumps(file))
    (folder / "classes.txt").write_text("paper\nbox\n")
    return folder / "coco.json", folder / "images"


@pytest.mark.slow
def test_a_pyramid_learns_to_tell_to_find_and_to_outline(run: Callable[..., str], tmp_path: Path) -> None:
    coco, images = things(tmp_path / "data")
    data = tmp_path / "data"
    assert len(run("classify.py", str(data / "photos"), "1").strip().splitlines()) >= 2
    assert "step 1: " in run("detect.py", str(coco), str(images), "1")
    assert "step 1: " in run("segment.py", str(images), str(data / "labels"), str(data / "classes.txt"), "1")
    for name in ("classifier", "detector", "segmenter"):
        assert (tmp_path / name / "model.safetensors").is_file()
