"""`stepwell extract` as it is typed: what comes out, what is refused in a line, and how it goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from extracting import classifier, picture, pictures_in, read, settings

from stepwell import cli

WITH_RAY = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray, of the extra scale, is not installed for this Python"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a classifier in `model`, ten pictures in `p`."""
    classifier().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pictures_in(Path("p"), 10)
    return tmp_path


PREDICT = ("--what", "predict", "--model", "model", "--device", "cpu")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert cli.main(["extract", *arguments]) == code
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.usefixtures("here")
def test_pictures_become_rows_and_a_second_run_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*PREDICT, "--shard-size", "4", "--processes", "0")
    assert run(capsys, "p", "out", *options) == ("10 pictures in out\n", "")
    frame = read(Path("out"))
    assert [*frame.id] == [f"p/{i:04}.png" for i in range(10)]
    assert {json.loads(one)["task"] for one in frame.prediction} == {"classification"}
    assert run(capsys, "p", "out", *options) == ("10 pictures in out, 10 of them from before\n", "")
    Path("out/part-00001.parquet").unlink()
    Path("out/.part-00001.77.parquet").touch()
    assert run(capsys, "p", "out", *options)[0] == "10 pictures in out, 6 of them from before\n"
    assert [*read(Path("out")).id] == [*frame.id]
    assert not [*Path("out").glob(".*")]
    about = json.loads(Path("out/_manifest.json").read_text())["about"]
    assert about["model"] == "model"
    assert about["pictures"] == ["p"]
    assert settings(Path("out"))["shard_size"] == 4


@pytest.mark.usefixtures("here")
def test_bad_pictures_are_rows_counted_in_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p/0003.png").write_text("no picture")
    options = (*PREDICT, "--shard-size", "4", "--processes", "0")
    for there in ("", ", 10 of them from before"):
        out, err = run(capsys, "p", "out", *options, code=1)
        assert out == f"10 pictures in out{there}\n"
        assert err == "stepwell: 1 of 10 pictures could not be looked at; their error says why\n"
    row = read(Path("out")).iloc[3]
    assert row.error.startswith("not an image")
    assert row.prediction is None
    assert row.width is None


@pytest.mark.usefixtures("here")
def test_a_limit_may_grow_and_not_shrink(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*PREDICT, "--shard-size", "4", "--processes", "0")
    run(capsys, "p", "out", *options, "--limit", "6")
    assert len(read(Path("out"))) == 6
    assert (
        run(capsys, "p", "out", *options, "--limit", "9")[0] == "9 pictures in out, 4 of them from before\n"
    )
    _, err = run(capsys, "p", "out", *options, "--limit", "3", code=2)
    assert "holds other pictures than are there now" in err
    assert len(read(Path("out"))) == 9


@pytest.mark.usefixtures("here")
def test_a_list_needs_no_pictures_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p/list.txt").write_text("0002.png\n0001.png\n")
    run(capsys, "out", "--list", "p/list.txt", *PREDICT, "--processes", "0")
    assert [*read(Path("out")).id] == ["0002.png", "0001.png"]


@pytest.mark.usefixtures("here")
def test_pictures_that_have_changed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*PREDICT, "--shard-size", "4", "--processes", "0")
    run(capsys, "p", "out", *options)
    Path("out/part-00002.parquet").unlink()
    picture(77).save("p/0000a.png")
    before = sorted(os.listdir("out"))
    out, err = run(capsys, "p", "out", *options, code=2)
    assert out == ""
    assert err.count("\n") == 1
    assert "part-00000.parquet holds other pictures" in err
    assert sorted(os.listdir("out")) == before


@pytest.mark.usefixtures("here")
def test_pictures_that_could_not_be_looked_at_are_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*PREDICT, "--shard-size", "4", "--processes", "0")
    whole = Path("p/0003.png").read_bytes()
    Path("p/0003.png").write_text("no picture")
    run(capsys, "p", "out", *options, code=1)
    Path("p/0003.png").write_bytes(whole)
    assert (
        run(capsys, "p", "out", *options, "--retry-bad")[0] == "10 pictures in out, 6 of them from before\n"
    )
    assert not read(Path("out")).error.any()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_script_that_its_processes_would_begin_again_is_told_so() -> None:
    script = Path("script.py")
    script.write_text(
        "import stepwell\n"
        "from stepwell.extract.run import Source, Wanted, extract\n"
        "model = stepwell.load('model', device='cpu')\n"
        "extract(model, Source(['p']), 'out', Wanted(what='predict'), processes=1)\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert "a script calls extract under `if __name__ == '__main__':`" in found.stderr.splitlines()[-1]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["p"], "name pictures, a folder and what"),
        (["p", "out"], "name pictures, a folder and what"),
        (["gone", "out", *PREDICT], "no such file: gone"),
        (["p/*.gif", "out", *PREDICT], "no such file: p/*.gif"),
        (["model", "out", *PREDICT], "no pictures in model"),
        (["p", "p", *PREDICT], "p holds other files"),
        (["p", "model/config.json", *PREDICT], "is a file"),
        (["p", "out", "--what", "predict", "--model", "p"], "p is not a model folder"),
        (["p", "out", "--what", "ask", "--model", "model"], "'ask' needs a question"),
        (["p", "out", "--question", "What?", *PREDICT], "others take none; got 'predict' with 'What?'"),
        (["p", "out", "--what", "ask", "--question", "What?", "--model", "model"], "model gives no answers"),
        (["p", "out", "--what", "tokens", "--model", "model"], "model gives no visual tokens"),
        (
            ["p", "out", "--what", "tokens", "--threshold", "0.5"],
            "threshold is for 'predict', not for 'tokens'",
        ),
        (["p", "out", "--what", "tokens", "--tiles"], "tiles is for 'predict', not for 'tokens'"),
        (["p", "out", "--tile-scale", "2", *PREDICT], "add --tiles"),
        (["p", "out", "--tiles", *PREDICT], "tiles"),
        (["p", "out", "--actors", "2", *PREDICT], "--actors are of --ray"),
        (["p", "out", "--ray", "local", "--processes", "2", *PREDICT], "--processes are of one machine"),
        (["p", "out", "--what", "all"], "--what"),
    ],
)
@pytest.mark.usefixtures("here")
def test_refusals_are_one_line_and_leave_nothing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out, err = run(capsys, *arguments, code=2)
    assert out == ""
    assert err.startswith("stepwell: ")
    assert err.count("\n") == 1
    assert words in err
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pyarrow", "pebble", "ray"])
@pytest.mark.usefixtures("here")
def test_a_lacking_package_is_one_line(package: str) -> None:
    typed = ["extract", "p", "out", *PREDICT, *(["--ray", "local"] if package == "ray" else [])]
    code = f"import sys; sys.modules[{package!r}] = None; from stepwell.cli import main; main({typed!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == f"stepwell: extract needs {package}: pip install 'stepwell[scale]'\n"
    assert not Path("out").exists()


def begun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stepwell", "extract", "p", "out", *PREDICT, "--shard-size", "8"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def parts() -> int:
    return len([*Path("out").glob("part-*.parquet")])


def until(fact: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not fact() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_killed_at_any_moment_no_row_is_lost_and_none_comes_twice() -> None:
    names = pictures_in(Path("p"), 400)
    chance = random.Random(0)
    for _ in range(2):
        process, there = begun(), parts()
        until(lambda there=there: parts() > there + 2, process)  # type: ignore[misc]
        time.sleep(chance.random() / 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    whole = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("part-*.parquet")}
    assert 0 < len(whole) < 50
    out, err = begun().communicate()
    assert (out, err) == (f"400 pictures in out, {8 * len(whole)} of them from before\n", "")
    assert [*read(Path("out")).id] == names
    assert {name: Path("out", name).stat().st_mtime_ns for name in whole} == whole
    assert sorted(os.listdir("out")) == ["_manifest.json", *(f"part-{i:05}.parquet" for i in range(50))]


@WITH_RAY
@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_ray_goes_on_where_one_machine_stopped_with_the_same_rows() -> None:
    pictures_in(Path("p"), 40)
    Path("p/0013.png").write_text("no picture")
    assert begun("--processes", "0").wait() == 1
    alone = read(Path("out"))
    for number in (1, 3):
        Path(f"out/part-{number:05}.parquet").unlink()
    process = begun("--ray", "local")
    out, err = process.communicate()
    assert out == "40 pictures in out, 24 of them from before\n"
    assert err.endswith("stepwell: 1 of 40 pictures could not be looked at; their error says why\n")
    assert process.returncode == 1
    assert read(Path("out")).equals(alone)
    footers = [pq.read_metadata(path).metadata[b"stepwell"] for path in sorted(Path("out").glob("part-*"))]
    assert [json.loads(one)["rows"] for one in footers] == [8] * 5


@WITH_RAY
@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "anything"])
@pytest.mark.usefixtures("here")
def test_no_cluster_is_one_line(capsys: pytest.CaptureFixture[str], address: str) -> None:
    out, err = run(capsys, "p", "out", *PREDICT, "--ray", address, code=2)
    assert out == ""
    assert err.splitlines()[-1].startswith(f"stepwell: no cluster of Ray at {address}")
    assert not [*Path().glob("out/part-*")]
