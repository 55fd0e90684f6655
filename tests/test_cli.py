"""The command line: what it prints, and what it refuses in one line before a model is loaded."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import stepwell
from stepwell import cli
from stepwell.encoders.catalogue import ENCODERS, build_encoder
from stepwell.flops.plan import parse_branches
from stepwell.look.trace import Traced
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.structures import TokenLayout
from stepwell.train.recipe import load_recipe
from stepwell.train.shipped import recipe_names
from stepwell.views.pyramid import PyramidGeometry

COMMAND = str(Path(sys.executable).parent / "stepwell")
RECEIPT = str(Path(__file__).parents[1] / "examples" / "receipt.jpg")


GEOMETRY = PyramidGeometry(
    names=("only",), sides=(64,), strides=(16,), framing="aspect", mean=(0.5,) * 3, std=(0.5,) * 3
)


class FakeAssistant(stepwell.Assistant):
    """Answers at once, and remembers what it was asked."""

    boxes_are_regions = True

    def __init__(self, **settings: object) -> None:
        self.settings = settings
        self.engine = SimpleNamespace(geometry=GEOMETRY)  # type: ignore[assignment]

    def layout(self, image: Any, *, region: Any = None) -> TokenLayout:
        return GEOMETRY.layout_of((image.height, image.width), region)

    def ask(
        self,
        image: Any,
        question: str,
        *,
        region: Any = None,
        max_new_tokens: int,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        self.images, self.question, self.max_new_tokens = image, question, max_new_tokens
        self.region = region
        for piece in ("27", ".30") if stream else ():
            stream(piece)
        return "27.30"


def ask_and_trace(
    assistant: FakeAssistant, images: Any, question: str, *, region: Any, max_new_tokens: int
) -> tuple[str, Traced]:
    """The fake's answer as two tokens, the first of which looks at the first visual token of all."""
    answer = assistant.ask(images, question, region=region, max_new_tokens=max_new_tokens)
    layouts = tuple(assistant.layout(image) for image in images)
    attention = torch.zeros(2, sum(layout.num_visual for layout in layouts))
    attention[:, 0] = 1
    return answer, Traced((1, 2), ("27.30", ""), torch.tensor([0.5, 1.0]), attention, (1, 0), layouts)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[FakeAssistant]:
    """Loading gives a fake and lists it here."""
    assistants: list[FakeAssistant] = []

    def load(model: str | None = None, limits: object = None, **settings: str | None) -> FakeAssistant:
        assistants.append(FakeAssistant(model=model, **settings))
        return assistants[-1]

    monkeypatch.setattr("stepwell.weights.light.load_to_ask", load)
    monkeypatch.setattr("stepwell.look.trace.ask_and_trace", ask_and_trace)
    return assistants


@pytest.fixture
def image_path(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.new("RGB", (64, 32), "white").save(path)
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error; nothing on standard output, exit code 2."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stepwell: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_prints_the_answer_and_nothing_else(
    capsys: pytest.CaptureFixture[str], loaded: list[FakeAssistant], image_path: str
) -> None:
    assert cli.main(["ask", image_path, "How much?", "--max-new-tokens", "7", "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("27.30\n", "")
    assert loaded[0].settings == {"model": None, "device": "cpu", "dtype": None, "revision": None}
    assert (loaded[0].question, loaded[0].max_new_tokens) == ("How much?", 7)
    assert [image.size for image in loaded[0].images] == [(64, 32)]


def test_streams_the_pieces_of_the_answer_once(
    capsys: pytest.CaptureFixture[str], loaded: list[FakeAssistant], image_path: str
) -> None:
    assert cli.main(["ask", image_path, "How much?", "--stream"]) == 0
    assert capsys.readouterr().out == "27.30\n"


def test_several_images_come_in_the_order_given_and_one_from_standard_input(
    loaded: list[FakeAssistant], image_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = io.BytesIO()
    Image.new("RGB", (20, 10)).save(piped, "PNG")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.getvalue())))
    assert cli.main(["ask", image_path, "-", RECEIPT, "Which is the receipt?"]) == 0
    assert [image.size for image in loaded[0].images] == [(64, 32), (20, 10), (884, 1838)]


def test_json_holds_answer_seconds_tokens_and_views(
    capsys: pytest.CaptureFixture[str], loaded: list[FakeAssistant], image_path: str
) -> None:
    assert cli.main(["ask", image_path, image_path, "How much?", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["answer"] == "27.30"
    assert report["seconds"] >= 0
    assert report["visual_tokens"] == 16
    assert report["confidence"] == 0.75
    assert report["where"] == {
        "image": 0,
        "box": [0, 0, 16, 16],
        "head": {"layer": 1, "head": 0},
        "tokens": [
            {"text": "27.30", "probability": 0.5, "box": [0, 0, 16, 16]},
            {"text": "", "probability": 1.0, "box": None},
        ],
    }
    assert report["views"] == 2 * [
        {"image": image_path, "name": "only", "size": [32, 64], "grid": [2, 4], "box": [0, 0, 64, 32]}
    ]


def test_a_region_is_told_in_fractions_and_asked_in_pixels(
    capsys: pytest.CaptureFixture[str], loaded: list[FakeAssistant], image_path: str
) -> None:
    assert cli.main(["ask", image_path, "How much?", "--region", "0.25, 0.5,0.75,1", "--json"]) == 0
    assert loaded[0].region == (16, 16, 48, 32)
    assert json.loads(capsys.readouterr().out)["region"] == [0.25, 0.5, 0.75, 1]
    assert cli.main(["ask", image_path, "How much?", "--json"]) == 0
    assert loaded[1].region is None
    assert "region" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("region", "complaint"),
    [
        ("0.1,0.2,0.3", "a region is (left, top, right, bottom), got (0.1, 0.2, 0.3)"),
        ("a,b,c,d", "--region is LEFT,TOP,RIGHT,BOTTOM, such as 0.1,0.4,0.6,0.45; got 'a,b,c,d'"),
        ("0.5,0.2,0.3,0.4", "left < right and top < bottom"),
        ("10,20,30,40", "in fractions of the image's sides, from 0 to 1"),
    ],
)
def test_a_wrong_region_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    loaded: list[FakeAssistant],
    image_path: str,
    region: str,
    complaint: str,
) -> None:
    assert complaint in refusal(capsys, "ask", image_path, "What?", "--region", region)
    assert not loaded


def test_a_region_is_of_one_image(
    capsys: pytest.CaptureFixture[str], loaded: list[FakeAssistant], image_path: str, tmp_path: Path
) -> None:
    asked = ["ask", image_path, image_path, "What?", "--region", "0,0,1,1"]
    assert "--region is of one image" in refusal(capsys, *asked)
    (tmp_path / "a.jsonl").write_text("{}")
    assert "--jsonl FILE names" in refusal(
        capsys, "ask", "--jsonl", str(tmp_path / "a.jsonl"), "--region", "0,0,1,1"
    )
    assert not loaded


def test_show_writes_the_image_of_the_views_and_leaves_no_draft(
    loaded: list[FakeAssistant], image_path: str, tmp_path: Path
) -> None:
    target = tmp_path / "drawn" / "views.png"
    target.parent.mkdir()
    assert cli.main(["ask", image_path, "How much?", "--show", str(target)]) == 0
    assert [path.name for path in target.parent.iterdir()] == ["views.png"]
    with Image.open(target) as drawn:
        assert drawn.width > 2 * 64


def test_show_draws_a_region_that_is_told_in_words_as_one_beside_them(
    loaded: list[FakeAssistant], image_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(GEOMETRY, names=("whole", "close"), sides=(32, 64), strides=(16, 16))
    monkeypatch.setattr(f"{__name__}.GEOMETRY", two)
    drawn = {}
    for name, question, beside in (
        ("whole", "How much?", []),
        ("words", "What is written in [0.25, 0.25, 0.75, 0.5]?", []),
        ("beside", "How much?", ["--region", "0.25,0.25,0.75,0.5"]),
    ):
        target = tmp_path / f"{name}.png"
        assert cli.main(["ask", image_path, question, *beside, "--show", str(target)]) == 0
        drawn[name] = target.read_bytes()
    assert drawn["words"] == drawn["beside"] != drawn["whole"]


def test_show_leaves_the_old_file_alone_when_drawing_fails(
    capsys: pytest.CaptureFixture[str],
    loaded: list[FakeAssistant],
    image_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "drawn" / "views.png"
    target.parent.mkdir()
    target.write_bytes(b"old")

    def full_disk(self: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert "no space left" in refusal(capsys, "ask", image_path, "How much?", "--show", str(target))
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"old"]


REFUSALS = [
    (["IMAGE", "  "], "question is empty"),
    (["missing.jpg", "What?"], "no such file: missing.jpg"),
    (["What is this?", "IMAGE"], "the question comes last"),
    (["TEXT", "What?"], "text.jpg"),
    (["CUT", "What?"], "cut.png"),
    (["FOLDER", "What?"], "Is a directory"),
    (["-", "-", "What?"], "more than once"),
    (["https://example.org/a.png", "What?"], "is a URL; images are not fetched"),
    (["IMAGE", "What?", "--model", "https://example.org/a/b"], "is a URL, and names on the hub look like"),
    (["IMAGE", "What?", "--model", "owner/name@v1"], "with the revision given apart"),
    (["IMAGE"], "name an image and a question"),
    (["IMAGE", "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["IMAGE", "What?", "--max-new-tokens", "many"], "--max-new-tokens"),
    (["IMAGE", "What?", "--dtype", "int3"], "float32"),
    (["IMAGE", "What?", "--device", "toaster"], "unknown device toaster"),
    (["IMAGE", "What?", "--device", "cuda:x"], "unknown device cuda:x"),
    (["IMAGE", "What?", "--verbose"], "--verbose"),
    (["IMAGE", "What?", "--stream", "--json"], "exclude each other"),
    (["IMAGE", "What?", "--model", "nonsense"], "unknown model nonsense"),
    (["IMAGE", "What?", "--model", "./no/such/folder"], "no such folder"),
    (["IMAGE", "What?", "--model", "IMAGE"], "is a file"),
    (["IMAGE", "What?", "--model", "FOLDER"], "no config.json"),
    (["IMAGE", "What?", "--model", "WEIGHTLESS"], "holds no weights"),
    (["IMAGE", "What?", "--show", "nowhere/views.png"], "there is no folder nowhere"),
    (["IMAGE", "What?", "--show", "views.doc"], ".png"),
    (["IMAGE", "What?", "--show", "IMAGE"], "is one of the pictures, and would be written over"),
    (["IMAGE", "IMAGE"], "the question comes last"),
    (
        ["IMAGE", "What?", "--model", "boards_tiny"],
        "boards_tiny answers no questions: it is a 'stepwell_detector'",
    ),
]


OTHER_REFUSALS = [
    (["train", "no_such_recipe"], "no recipe no_such_recipe"),
    (["train"], "missing argument"),
    (["convert", "no_such.pth", "out", "--as", "piip"], "no such file or folder: no_such.pth"),
    (["convert", RECEIPT, "out"], "--as NAME"),
    (["convert", "https://example.org/a.pth", "out", "--as", "piip"], "a URL is not fetched"),
    (["convert", RECEIPT, "--as", "piip"], "which folder to write"),
    (["convert", RECEIPT, "out", "--as", "piip", "--dry-run"], "leave OUT out"),
    (["flops"], "name a model, or take --paper"),
    (["flops", "piip", "--paper"], "takes no model"),
    (["flops", "piip", "--size", "0x3"], "WIDTHxHEIGHT"),
    (["flops", "--paper", "--size", "20x20"], "--paper takes no --size"),
    (["plan", "--branches", "deit:B,S,T"], "--budget-gflops"),
    (["plan", "--branches", "deit:S", "--budget-gflops", "3", "--json", "--yaml"], "exclude each other"),
    (["plan", "--branches", "deit:Q", "--budget-gflops", "3"], "deit_b"),
]


@pytest.mark.parametrize(
    ("arguments", "reason"), OTHER_REFUSALS, ids=[" ".join(r[0]) for r in OTHER_REFUSALS]
)
def test_other_commands_refuse_in_one_line_too(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refusal(capsys, *arguments)


def test_plan_prints_the_same_pyramids_as_table_json_and_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    """Table I of the PIIP paper has 1120/896/448 at 243 GFLOPs."""
    printed = []
    for form in ([], ["--json"], ["--yaml"]):
        assert cli.main(["plan", "--branches", "deit:B,S,T", "--budget-gflops", "243", *form]) == 0
        printed.append(capsys.readouterr().out)
    assert "1120/896/448" in printed[0]
    assert len(json.loads(printed[1])) == len(printed[0].splitlines()) - 2
    assert len(list(yaml.safe_load_all(printed[2]))) == len(json.loads(printed[1]))


def test_flops_counts_a_published_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Table I of the PIIP paper prints 243 GFLOPs for it."""
    assert cli.main(["flops", "piip_det_tsb_1120_896_448"]) == 0
    assert "243.1" in capsys.readouterr().out


def test_flops_counts_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: reader_tiny\nmodel: {text: {num_hidden_layers: 1}}\n")
    gflops = []
    for recipe in ("reader_tiny", str(tmp_path / "mine.yaml")):
        assert cli.main(["flops", recipe, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["visual_tokens"] == 80 * 80
        gflops.append({part["name"]: part["true_gflops"] for part in report["parts"]})
    assert gflops[1]["language_model"] == pytest.approx(gflops[0]["language_model"] / 4, rel=0.01)
    assert gflops[1]["branches.0"] == gflops[0]["branches.0"]


@pytest.mark.parametrize("recipe", ["detect", "segment", "classify"])
def test_flops_counts_the_pyramid_of_a_recipe_of_perception(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["flops", recipe, "--json"]) == 0
    names = [part["name"] for part in json.loads(capsys.readouterr().out)["parts"]]
    assert names[:3] == ["branches.0", "branches.1", "interactions"]


def test_a_published_model_is_counted_before_a_recipe_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe would have to fetch a tokenizer."""
    assert {"uhd_v2_paper", "inf_llava"} <= {*PUBLISHED} & {*recipe_names()}
    assert cli.main(["flops", "inf_llava", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 576


def test_a_folder_is_counted_before_a_recipe_of_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reader_tiny").mkdir()
    (tmp_path / "reader_tiny" / "config.json").write_text('{"model_type": "nobody"}')
    monkeypatch.chdir(tmp_path)
    assert cli.main(["flops", "reader_tiny"]) == 2
    assert "'nobody'" in capsys.readouterr().err


def test_a_dry_run_that_does_not_fit_prints_the_report_and_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"some.weight": [3, 2]}))
    assert cli.main(["convert", str(manifest), "--as", "piip_det_tsb_1120_896_448", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert "some.weight" in out
    assert err.startswith("stepwell: ")
    assert err.count("\n") == 1


def test_a_model_that_cannot_answer_is_refused(
    capsys: pytest.CaptureFixture[str], image_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell.weights.light.load_to_ask", lambda *args, **kwargs: object())
    assert "answers no questions" in refusal(capsys, "ask", image_path, "What?")


@pytest.mark.parametrize(("arguments", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_refuses_in_one_line_before_a_model_is_loaded(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    loaded: list[FakeAssistant],
    image_path: str,
    tmp_path: Path,
) -> None:
    places = {name: tmp_path / name.lower() for name in ("FOLDER", "WEIGHTLESS")}
    for folder in places.values():
        folder.mkdir()
    (places["WEIGHTLESS"] / "config.json").write_text("{}")
    places["IMAGE"] = Path(image_path)
    places["TEXT"] = tmp_path / "text.jpg"
    places["TEXT"].write_text("<html>not an image</html>")
    places["CUT"] = tmp_path / "cut.png"
    places["CUT"].write_bytes(Path(image_path).read_bytes()[:60])
    assert reason in refusal(capsys, "ask", *(str(places.get(word, word)) for word in arguments))
    assert loaded == []


def test_an_error_of_several_lines_is_told_in_one(
    capsys: pytest.CaptureFixture[str], image_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise ValueError("weights do not fit:\n  a.weight (2, 3)\n  b.weight (4,)")

    monkeypatch.setattr("stepwell.weights.light.load_to_ask", exec_in_package(load))
    line = refusal(capsys, "ask", image_path, "What?")
    assert line == "stepwell: weights do not fit: a.weight (2, 3) b.weight (4,)\n"
    with pytest.raises(ValueError, match="do not fit"):
        cli.main(["--traceback", "ask", image_path, "What?"])


def test_an_unknown_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such command 'aks'" in refusal(capsys, "aks", "receipt.jpg").lower()


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "ask" in capsys.readouterr().out


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, timeout=60, check=False, **options)


def test_version_is_that_of_the_package() -> None:
    assert run("--version").stdout.decode().split() == ["stepwell", stepwell.__version__]


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        [COMMAND, "ask", "--help"],
        env=buffered,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert result.stderr == b""
    assert result.returncode == 1


def test_ctrl_c_ends_in_one_line() -> None:
    process = subprocess.Popen(
        [COMMAND, "ask", "-", "What?"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & would have it ignored
    )
    assert process.stdin is not None
    process.stdin.write(bytes(1_000_000))  # more than a pipe holds, so it is reading when this returns
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"stepwell: interrupted\n")


def test_lines_of_a_file_are_answered_as_lines(
    capsys: pytest.CaptureFixture[str], image_path: str, tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    lines = [{"image": image, "question": "What is it?"} for image in (image_path, "missing.png")]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["ask", "--jsonl", str(file), "--max-new-tokens", "2"]) == 2
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert isinstance(first["answer"], str)
    assert "missing.png: no such file" in second["error"]
    assert err == f"stepwell: 1 of 2 lines of {file} have no answer; their error says why\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--jsonl", "no_such.jsonl"], "no such file: no_such.jsonl"),
        (["--jsonl", "FILE", "a.png", "What?"], "--jsonl FILE names the images and questions itself"),
        (["--jsonl", "FILE", "--stream"], "--jsonl FILE names the images"),
        (["--jsonl", "FILE"], "questions.jsonl, line 1 is not JSON"),
        ([], "name an image and a question"),
        (["a.png"], "name an image and a question"),
    ],
)
def test_files_of_questions_are_refused_before_a_model_is_loaded(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    loaded: list[FakeAssistant],
    tmp_path: Path,
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("no JSON")
    assert reason in refusal(capsys, "ask", *(str(file) if word == "FILE" else word for word in arguments))
    assert loaded == []


def test_a_fault_of_ours_shows_where_it_was_and_asks_for_a_report(
    capsys: pytest.CaptureFixture[str],
    loaded: list[FakeAssistant],
    image_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise ValueError("no such thing here")

    refusing = exec_in_package(refuse)
    faults = (lambda: int("x"), lambda: {}["key"], lambda: torch.zeros(2) @ torch.zeros(3), refuse)
    for fault in faults:
        monkeypatch.setattr(FakeAssistant, "ask", lambda *_, fault=fault, **__: fault())
        assert cli.main(["ask", image_path, "What?"]) == 1
        told = capsys.readouterr().err
        assert told.startswith("Traceback")
        assert told.splitlines()[-1].startswith("stepwell: a fault of stepwell, not of what it was given")
    refusals = {
        refusing: "no such thing here",
        lambda: Path("nowhere").read_text(): "no such file: nowhere",
        out_of_memory: "not enough memory",
    }
    for refused, words in refusals.items():
        monkeypatch.setattr(FakeAssistant, "ask", lambda *_, refused=refused, **__: refused())
        assert cli.main(["ask", image_path, "What?"]) == 2
        assert capsys.readouterr().err == f"stepwell: {words}\n"


def exec_in_package(function: Any) -> Any:
    """The same function, as if it stood in a file of the package."""
    code = function.__code__.replace(co_filename=str(Path(cli.__file__).with_name("somewhere.py")))
    return FunctionType(code, globals())


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def test_limits_are_options_and_a_refusal_names_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wide, lines = tmp_path / "wide.png", tmp_path / "questions.jsonl"
    Image.new("RGB", (402, 2)).save(wide)
    lines.write_text('{"image": "wide.png", "question": "What?"}')
    option = ["--max-aspect", "201"]
    assert "--max-aspect 201" in refusal(capsys, "ask", str(wide), "What?")
    for what in ([str(wide), "What?"], ["--jsonl", str(lines)]):
        assert cli.main(["ask", *what, *option, "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["ask", "--jsonl", str(lines)]) == 2
    assert "--max-aspect 201" in json.loads(capsys.readouterr().out)["error"]
    for name, value in (("pixels", "803"), ("side", "401"), ("bytes", "9"), ("seconds", "1e-9")):
        tight = ["ask", str(wide), "What?", *option, f"--max-{name}", value]
        assert f"--max-{name} " in refusal(capsys, *tight)
    assert "image limits must be" in refusal(capsys, "ask", str(wide), "What?", "--max-seconds", "0")


def test_json_tells_which_model_was_asked_what(
    capsys: pytest.CaptureFixture[str], loaded: list[FakeAssistant], image_path: str, whole_folder: str
) -> None:
    for model, name in (([], "reader_tiny"), (["--model", whole_folder], whole_folder)):
        assert cli.main(["ask", image_path, " How much? ", "--json", *model]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["model"], told["question"], told["commit"]) == (name, " How much? ", None)


@pytest.fixture
def whole_folder(tmp_path: Path) -> str:
    """What looks like a model from outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "stepwell"}')
    (folder / "model.safetensors").touch()
    return str(folder)


def test_the_revision_goes_to_who_loads(loaded: list[FakeAssistant], image_path: str) -> None:
    assert cli.main(["ask", image_path, "What?", "--model", "owner/name", "--revision", "v1"]) == 0
    assert loaded[0].settings["model"] == "owner/name"
    assert loaded[0].settings["revision"] == "v1"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[dict[str, Any]]]:
    assert cli.main(["list", *arguments, "--json"]) == 0
    told: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out)
    return told


def test_what_is_listed_is_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    told = {kind: [entry["name"] for entry in entries] for kind, entries in listed(capsys).items()}
    shipped = sorted(path.stem for path in (Path(cli.__file__).parent / "recipes").glob("*.yaml"))
    assert told == {"recipes": shipped, "published": list(PUBLISHED), "encoders": list(ENCODERS)}
    for kind, names in told.items():
        assert list(listed(capsys, kind)) == [kind]
        assert cli.main(["list", kind]) == 0
        heading, *lines = capsys.readouterr().out.splitlines()
        assert heading.startswith(f"{kind}: ")
        assert [line.split()[0] for line in lines] == names
        assert all(len(line.split()) > 1 for line in lines)


def test_listed_names_are_those_that_other_commands_take(capsys: pytest.CaptureFixture[str]) -> None:
    told = listed(capsys)
    for recipe in told["recipes"]:
        assert load_recipe(recipe["name"]).name == recipe["name"]
    for entry in told["encoders"]:
        assert parse_branches(entry["name"]) == [entry["name"]]
        with torch.device("meta"):
            spec = build_encoder(entry["name"]).spec
        assert (spec.depth, spec.dim, spec.stride) == (entry["layers"], entry["width"], entry["stride"])
    for entry in told["published"]:
        assert find_published(entry["name"]).name == entry["name"]
        if entry["released"]:
            assert find_published(entry["released"]).name == entry["name"]
        assert ("not released" in entry["about"]) == (entry["released"] is None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "heavy"), [("recipes", "torch"), ("encoders", "transformers")])
def test_names_are_told_without_what_takes_long_to_import(kind: str, heavy: str) -> None:
    code = (
        f"import sys; from stepwell.cli import main; main(['list', {kind!r}]); "
        f"raise SystemExit({heavy!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_training_without_its_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell.commands.train.find_spec", lambda name: None)
    assert "training needs accelerate: pip install 'stepwell[train]'" in refusal(
        capsys, "train", "reader_smoke"
    )
