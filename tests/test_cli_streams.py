"""The command line where terminals, disks and arguments are not what one hopes for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import stepwell
from stepwell import cli
from stepwell.images.limits import ImageLimits
from stepwell.look.trace import Traced
from stepwell.views.pyramid import PyramidGeometry

Run = Callable[..., tuple[int, str, str]]
ANSWER = "größe: 3 €"
UNDECODED = os.fsdecode(b"gr\xf6\xdfe")  # as a Latin-1 terminal gives it


class Parrot(stepwell.Assistant):
    """Answers with one text, and remembers the question."""

    boxes_are_regions = False

    def __init__(self) -> None:
        sides: dict[str, Any] = {"names": ("only",), "sides": (64,), "strides": (16,), "framing": "aspect"}
        geometry = PyramidGeometry(**sides, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.engine = SimpleNamespace(geometry=geometry, limits=ImageLimits())  # type: ignore[assignment]

    def ask(self, image: Any, question: Any, *, stream: Any = None, **_: Any) -> str:
        self.question = question
        if stream is not None:
            stream(ANSWER)
        return ANSWER


def trace_of_parrot(parrot: Parrot, images: Any, question: Any, **_: Any) -> tuple[str, Traced]:
    """In place of `ask_and_trace`: the answer is one token."""
    layouts = tuple(parrot.layout(image) for image in images)
    return parrot.ask(images, question), Traced((1,), (ANSWER,), torch.ones(1), None, None, layouts)


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    parrot = Parrot()
    monkeypatch.setattr("stepwell.weights.light.load_to_ask", lambda *_, **__: parrot)
    monkeypatch.setattr("stepwell.look.trace.ask_and_trace", trace_of_parrot)
    return parrot


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.new("RGB", (64, 32)).save(path)
    return str(path)


@pytest.fixture
def run_in_ascii(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command whose standard output and error take ASCII, strictly. -> exit code, and what arrived."""

    def run(*arguments: str) -> tuple[int, str, str]:
        written = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
        with monkeypatch.context() as patch:
            for name, buffer in written.items():
                patch.setattr(sys, name, io.TextIOWrapper(buffer, "ascii", write_through=True))
            code = cli.main(list(arguments))
            out, err = (buffer.getvalue().decode("ascii") for buffer in written.values())
        return code, out, err

    return run


def test_bytes_of_a_question_that_are_no_text_are_replaced(parrot: Parrot, image: str) -> None:
    assert cli.main(["ask", image, UNDECODED]) == 0
    assert parrot.question == b"gr\xf6\xdfe".decode("utf-8", "replace")


def test_a_question_that_python_did_not_decode_is_read_as_utf8(parrot: Parrot, image: str) -> None:
    """In the C locale Python takes the bytes of all that is not ASCII for undecodable."""
    assert cli.main(["ask", image, "größe".encode().decode("ascii", "surrogateescape")]) == 0
    assert parrot.question == "größe"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_files_whose_names_are_no_text_are_opened_and_written(
    parrot: Parrot, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"{tmp_path}/{UNDECODED}.png"
    Path(image).rename(named)
    shown = tmp_path / f"{UNDECODED}.views.png"
    assert cli.main(["ask", named, "What?", "--json", "--show", str(shown)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {view["image"] for view in told["views"]} == {named}
    assert shown.is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "IMAGE", "What?", "--model", UNDECODED],
        ["ask", "IMAGE", "What?", "--model", f"owner/{UNDECODED}"],
        ["ask", "IMAGE", "What?", "--device", UNDECODED],
        ["ask", "IMAGE", "What?", "--show", f"{UNDECODED}/views.png"],
        ["ask", "IMAGE", "What?", f"--{UNDECODED}"],
        ["ask", f"{UNDECODED}.png", "What?"],
        ["ask", "--jsonl", UNDECODED],
        ["train", UNDECODED],
        ["train", "reader_smoke", "--set", UNDECODED],
        ["train", "reader_smoke", "--set", f"name={UNDECODED}"],
        ["train", "reader_smoke", "--set", f"{UNDECODED}=1"],
        ["train", "LATIN"],
        ["flops", UNDECODED],
        ["plan", "--branches", UNDECODED, "--budget-gflops", "3"],
        ["convert", UNDECODED, "out", "--as", "piip"],
        ["convert", "IMAGE", "out", "--as", UNDECODED],
        ["list", UNDECODED],
        [UNDECODED],
    ],
)
@pytest.mark.usefixtures("parrot")
def test_other_arguments_that_are_no_text_are_refused_in_one_line(
    arguments: list[str], image: str, tmp_path: Path, run_in_ascii: Run
) -> None:
    places = {"IMAGE": image, "LATIN": str(tmp_path / "latin.yaml")}
    Path(places["LATIN"]).write_bytes("name: größe".encode("latin-1"))
    code, out, err = run_in_ascii(*(places.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("stepwell: ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("parrot")
@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_what_a_terminal_cannot_show_is_escaped(options: list[str], image: str, run_in_ascii: Run) -> None:
    assert run_in_ascii("ask", image, "What?", *options) == (0, r"gr\xf6\xdfe: 3 \u20ac" + "\n", "")


@pytest.mark.usefixtures("parrot")
def test_json_stays_json_where_only_ascii_is_taken(image: str, run_in_ascii: Run) -> None:
    _, out, _ = run_in_ascii("ask", image, ANSWER, "--json")
    told = json.loads(out)
    assert (told["answer"], told["question"]) == (ANSWER, ANSWER)


@pytest.mark.usefixtures("parrot")
def test_json_is_legible_elsewhere(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", image, "What?", "--json"]) == 0
    assert ANSWER in capsys.readouterr().out


@pytest.mark.usefixtures("parrot")
def test_closed_streams_take_and_give_nothing(
    image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for closed, arguments, code in (
        ("stdout", [image, "What?"], 0),
        ("stderr", ["nowhere.png", "What?"], 2),
        ("stdin", ["-", "What?"], 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, closed, None)
            assert cli.main(["ask", *arguments]) == code
    assert capsys.readouterr() == ("", "stepwell: standard input: the file is empty\n")


def test_a_closed_stream_takes_the_name_of_a_file_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    cli.main(["--version"])
    print("bad\udcff.png", file=sys.stdout, flush=True)


def test_an_error_about_a_full_disk_is_a_line_whatever_library_it_comes_from(
    parrot: Parrot, image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object, **__: object) -> str:
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr(parrot, "ask", fill)
    assert cli.main(["ask", image, "What?"]) == 2
    assert capsys.readouterr().err == "stepwell: no space left on device\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize(
    ("redirections", "code", "told"),
    [
        (">/dev/full", 2, b"stepwell: no space left on device\n"),
        (">/dev/full 2>/dev/full", 2, b""),
        (">&-", 0, b""),
        (">&- 2>&- <&-", 0, b""),
    ],
)
@pytest.mark.parametrize("arguments", ["--version", "--help", "list recipes"])
def test_a_process_ends_in_a_line_where_its_streams_are_full_or_closed(
    redirections: str, code: int, told: bytes, arguments: str
) -> None:
    """Python itself says nothing on its way out either."""
    command = f'"$0" -m stepwell {arguments} {redirections}'
    run = subprocess.run(
        ["sh", "-c", command, sys.executable],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (code, b"", told)
