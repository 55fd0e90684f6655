"""Every command and every snippet of Python in docs/ is run, with small files in place of people's own; or it
says here why it is not.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import stepwell
from stepwell import cli
from stepwell.folders import SHIPPED, SHIPPED_DETECTOR

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))

TRAINS = "hours on data of one's own; tests/train and tests/test_examples.py train the same small"
SERVES = "answers until it is stopped; tests/serve starts it and asks"
NOT_RUN = {
    "pip install": "installs; that its extras exist is tested below",
    "python3 -m venv": "what the Makefile does",
    "ln -s a/folder": "data sets that are not in the repository",
    "grep ": "of those data sets",
    "python benchmarks/": "minutes to days, on data sets and wheels that are not in the repository",
    "python examples/trl_sft.py": "tests/integrations/test_trl_example.py runs it on a tiny model",
    "python examples/lmms_eval": "in an environment of its own; tests/integrations/test_lmms_eval.py",
    "python -m lmms_eval": "in an environment of its own; tests/integrations/test_lmms_eval.py",
    "HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 python -m lmms_eval": "the same, offline",
    "swift ": "in an environment of its own; tests/integrations/test_ms_swift.py",
    "curl ": "to the server of the line before; tests/serve/test_predict_route.py",
    "stepwell train shop.yaml": TRAINS,
    "stepwell train boards.yaml": TRAINS,
    "stepwell train land.yaml": TRAINS,
    "stepwell train mine.yaml": TRAINS,
    "stepwell train reader_smoke": "a minute and more; tests/train/test_run.py runs it",
    "stepwell train reader_tiny": "hours; tests/train/test_dry_run.py reads the recipe",
    "stepwell train uhd_v2_upsampler": "wants COCO and a GPU; tests/train/test_upsampler.py trains one",
    "stepwell flops --paper": "most of a minute; tests/flops/test_tables.py prints some of its rows",
    "stepwell compare": "trains for hours; tests/evaluate/test_compare.py compares small systems",
    "stepwell convert model.pth": "a release of 1 GB; tests/weights/test_convert.py converts small ones",
    "stepwell serve": SERVES,
    "stepwell demo": SERVES,
    'stepwell extract "/mnt/': "a cluster; tests/extract/test_extract_command.py runs Ray on this machine",
    "stepwell evaluate reader_tiny pages/": "300 pages; the other lines of `stepwell evaluate` are run",
    "stepwell evaluate reader_tiny reads": "a data set that is not in the repository",
    "stepwell evaluate reader_tiny fields": "the same",
    "stepwell evaluate runs/cut": "a model that is not in the repository",
    "stepwell train benchmarks/": "hours, on data sets that are not in the repository",
    "torchrun --nproc-per-node 2 -m stepwell train benchmarks/": "the same",
    "stepwell draw pages --count 40 --seed 42": "what `stepwell compare` reads, which is not run",
    "import base64\n\nimport openai": "to a running server; tests/serve/test_chat_route.py asks so",
}
"""The first words of a command or a snippet, and why nobody runs it here."""

SMALLER = {
    "--count 500": "--count 2",
    "pages2 --kind": "pages2 --count 2 --kind",
    "--sizes 336,672,1008": "--sizes 640,1280",
    "my_classifier data": "my_classifier classes",
    "--fonts ~/fonts": "--fonts fonts",
    "InfConfig()": 'InfConfig(encoder="vit_nano", arguments={"patch": 14})',
    "UhdV2Config(max_slices=6)": 'UhdV2Config(encoder="vit_nano", max_slices=6)',
}
"""What would take minutes, or read a home folder, and what is run in its place."""

PICTURES = "receipt a b c another street photo".split()


def pieces(path: Path) -> Iterator[tuple[str, str]]:
    """("sh", a command) or ("python", a snippet), in the order of a page."""
    for language, block in re.findall(r"^ *```(sh|python)\n(.*?)^ *```", path.read_text(), re.DOTALL | re.M):
        if language == "python":
            yield language, textwrap.dedent(block)
            continue
        for line in textwrap.dedent(block).replace("\\\n", " ").splitlines():
            if command := line.partition(" #")[0].strip():
                yield language, command


def reason(piece: str) -> str | None:
    """Why it is not run."""
    return next((why for words, why in NOT_RUN.items() if piece.startswith(words)), None)


ALL = [(path, language, piece) for path in DOCS for language, piece in pieces(path)]
RUN = {path: [pair for pair in pieces(path) if reason(pair[1]) is None] for path in DOCS}


def test_the_list_of_what_is_not_run_is_true() -> None:
    for words in NOT_RUN:
        assert any(piece.startswith(words) for _, _, piece in ALL), words
    for words in SMALLER:
        assert any(words in piece for _, _, piece in ALL), words


def test_commands_that_are_run_are_ours() -> None:
    """Others would be run by a shell, which knows no stand-ins."""
    for pairs in RUN.values():
        for language, piece in pairs:
            assert language == "python" or piece.startswith("stepwell "), piece


def test_extras_that_are_shown_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = {name for path in DOCS for name in re.findall(r"stepwell\[([\w,-]+)\]", path.read_text())}
    assert {name for names in shown for name in names.split(",")} <= extras.keys()


# ---- what people would have, in small ---------------------------------------------------------------------


def link(place: str, model: Path) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).symlink_to(model)


def boards(file: str) -> None:
    """A COCO file of one board, and its image beside it."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "examples/board_1.jpg", path.parent)
    box = {"id": 1, "image_id": 1, "bbox": [153, 76, 40, 28], "area": 1120, "iscrowd": 0}
    outline = {"segmentation": [[153, 76, 193, 76, 193, 104, 153, 104]]}
    image = {"id": 1, "file_name": "board_1.jpg", "width": 640, "height": 640}
    names = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    annotations = [box | outline | {"category_id": 6}]
    path.write_text(json.dumps({"images": [image], "annotations": annotations, "categories": categories}))


def classes(folder: str) -> None:
    """A folder of two classes, and a classifier of them."""
    for name, colour in (("red", "red"), ("blue", "blue")):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(Path(folder) / name / "1.png")


def classifier(folder: str) -> None:
    branch = stepwell.BranchConfig(encoder="vit_nano", size=32, interactions=((0, 3),))
    config = stepwell.PyramidClassifierConfig(
        stepwell.ClassifierSettings(branches=(branch,)), id2label={0: "red", 1: "blue"}
    )
    stepwell.PyramidForImageClassification(config).save_pretrained(folder)


def label_maps(labels: str, images: str) -> None:
    for folder in (labels, images):
        Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(labels) / "classes.txt").write_text("land\nwater\n")
    Image.new("L", (64, 48), 1).save(f"{labels}/1.png")
    Image.new("RGB", (64, 48), "red").save(f"{images}/1.png")


def segmenter(folder: str) -> None:
    branches = stepwell.pyramid_branches(("vit_nano", 32), interactions=2)
    backbone = stepwell.PyramidBackboneConfig(stepwell.DenseSettings(branches=branches))
    config = stepwell.StepwellSegmenterConfig(backbone, id2label={0: "land", 1: "water"})
    stepwell.StepwellForSemanticSegmentation(config).save_pretrained(folder)


def questions(file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    image = str(ROOT / "examples/receipt.jpg")
    row = {"image": image, "question": "What is the total?", "answers": 10 * ["5.20"], "type": "total"}
    Path(file).write_text(json.dumps(row) + "\n")


def deit(file: str, names: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    Path(file).parent.mkdir(exist_ok=True)
    torch.save(timm.create_model("deit3_base_patch16_224").state_dict(), file)


def for_quickstart(names: dict[str, Any]) -> None:
    classes("photos")
    link("a/folder/of/ours", SHIPPED)
    names["image"] = Image.open("receipt.jpg").convert("RGB")
    names["processor"] = stepwell.StepwellProcessor.from_pretrained(SHIPPED)


def for_data(names: dict[str, Any]) -> None:
    boards("annotations/train.json")
    fonts = pytest.importorskip("matplotlib").get_data_path()
    shutil.copytree(Path(fonts) / "fonts/ttf", "fonts")


def for_detect(names: dict[str, Any]) -> None:
    boards("data/train.json")
    boards("data/val.json")
    boards("photos/all.json")
    link("runs/boards/model", SHIPPED_DETECTOR)


def for_predict(names: dict[str, Any]) -> None:
    boards("pictures/all.json")
    Path("more/inner").mkdir(parents=True)
    shutil.copy("survey.tif", "more/inner/one.tif")
    link("path/to/a/detector", SHIPPED_DETECTOR)


def for_extract(names: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    link("my_model", SHIPPED)
    link("my_detector", SHIPPED_DETECTOR)
    for folder in ("pictures", "shards"):
        Path(folder).mkdir()
    shutil.copy("a.jpg", "pictures")
    with tarfile.open("shards/0.tar", "w") as tar:
        tar.add("a.jpg")
    pq.write_table(pa.table({"image": [Path("b.jpg").read_bytes()]}), "table.parquet")
    Path("list.txt").write_text("a.jpg\n")


def for_evaluate(names: dict[str, Any]) -> None:
    questions("questions.jsonl")
    questions("data/annotations/vqa_val.jsonl")
    boards("data/annotations/val.json")
    Path("data.yaml").write_text("path: yolo\nval: images\nnames: {0: open, 1: pin-hole}\n")
    for place in ("yolo/images", "yolo/labels"):
        Path(place).mkdir(parents=True)
    shutil.copy(ROOT / "examples/board_1.jpg", "yolo/images")
    Path("yolo/labels/board_1.txt").write_text("1 0.27 0.14 0.06 0.04\n")
    label_maps("data/labels/val", "data/images/val")
    classes("classes/val")
    link("my_model", SHIPPED)
    link("my_detector", SHIPPED_DETECTOR)
    classifier("my_classifier")
    segmenter("my_segmenter")


def for_weights(names: dict[str, Any]) -> None:
    deit("checkpoints/deit_3_base_224_21k.pth", names)
    link("a/folder", SHIPPED)
    link("another/folder", SHIPPED)
    untrained = stepwell.StepwellForConditionalGeneration(stepwell.load().model.config)
    names |= {"stepwell": stepwell, "model": untrained}


PREPARE: dict[str, Callable[[dict[str, Any]], None]] = {
    "classify": lambda names: (classes("photos/train"), classes("photos/val"), classifier("runs/shop/model")),
    "data": for_data,
    "detect": for_detect,
    "evaluate": for_evaluate,
    "export": lambda names: boards("deeppcb/val.json"),
    "extract": for_extract,
    "fine_tune": lambda names: link("runs/mine/model", SHIPPED),
    "integrations": lambda names: questions("data/annotations/vqa_val.jsonl"),
    "own_parts": lambda names: deit("checkpoints/deit3_b.pth", names),
    "perception": lambda names: link("converted/piip_det_tsb_1120_896_448", SHIPPED_DETECTOR),
    "predict": for_predict,
    "quickstart": for_quickstart,
    "results": lambda names: questions("data/annotations/vqa_val.jsonl"),
    "segment": lambda names: (label_maps("labels", "images"), segmenter("runs/land/model")),
    "weights": for_weights,
}
"""By the name of a page: what its commands find where they run, and names its snippets take as known."""


def outlines_of_pyramid(names: dict[str, Any]) -> object:
    return [tuple(one.shape[2:]) for one in names["maps"]]


RESULTS: dict[str, tuple[Callable[[dict[str, Any]], object], object]] = {
    "pyramids": (outlines_of_pyramid, [(112, 168), (56, 84), (28, 42), (14, 21)]),
    "inf": (lambda names: (len(names["layout"].views), names["layout"].num_visual), (10, 576)),
    "uhd": (lambda names: (names["layout"].tiles, names["layout"].num_visual), ((2, 3), 1008)),
    "piip": (lambda names: names["backbone"].strides, (4.0, 8.0, 16.0, 32.0)),
}
"""By the name of a page: what its comments promise."""


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, pairs in RUN.items() if pairs], ids=lambda path: path.stem)
def test_what_a_page_shows_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    for name in PICTURES:
        shutil.copy(ROOT / "examples/receipt.jpg", f"{name}.jpg")
    Image.open("a.jpg").save("a.png")
    for name in ("huge.tif", "survey.tif"):
        Image.open(ROOT / "examples/board_1.jpg").save(name)
    names: dict[str, Any] = {"__name__": "__main__"}  # what a guard lets through is run too
    PREPARE.get(path.stem, lambda names: None)(names)
    for language, piece in RUN[path]:
        for large, small in SMALLER.items():
            piece = piece.replace(large, small)
        if language == "python":
            exec(compile(piece, f"{path.name}: {piece[:60]!r}", "exec"), names)
        else:
            words = shlex.split(piece.partition(" > ")[0].removesuffix(" &"))
            assert cli.main(words[1:]) == 0, piece
    if path.stem in RESULTS:
        told, promised = RESULTS[path.stem]
        assert told(names) == promised
