"""A run: its answers are those of asking, it goes on where it was stopped, and bad rows are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from copy import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from stepwell import cli
from stepwell.evaluate.answers import digest_of_weights
from stepwell.evaluate.run import SUFFIXES, evaluate
from stepwell.weights.light import load_light
from stepwell.weights.load import load


def questions(count):
    return [
        {
            "image": f"{i % 3}.png",
            "question": f"What is number {i}?",
            "answers": [f"answer {i}"],
            "type": "odd" if i % 2 else "even",
        }
        for i in range(count)
    ]


def run(assistant, data, output, **options):
    options = {"metric": "anls", "max_new_tokens": 4, "batch_size": 2, **options}
    return evaluate(assistant, data, output=output, **options)


def lines(output):
    return [json.loads(line) for line in (output / "answers.jsonl").read_text("utf-8").splitlines()]


def test_answers_are_those_of_asking_and_the_scores_those_of_the_answers(assistant, folder, write):
    rows = questions(5)
    asked = [f"{row['question']}\n{SUFFIXES['SHORT']}" for row in rows]
    right = [
        assistant.ask(folder / row["image"], text, max_new_tokens=4)
        for row, text in zip(rows, asked, strict=True)
    ]
    for i in (1, 2, 3):
        rows[i]["answers"] = ["", right[i]]
    done = []
    report = run(
        assistant, write(*rows), folder / "out", suffix="SHORT", progress=lambda *count: done.append(count)
    )
    assert [line["prediction"] for line in lines(folder / "out")] == right
    assert [line["question"] for line in lines(folder / "out")] == asked
    assert done == [(2, 5), (4, 5), (5, 5)]
    expected = [float(i in (1, 2, 3)) for i in range(5)]
    assert report.scores.score == pytest.approx(sum(expected) / 5)
    assert {kind: (s.questions, s.score) for kind, s in report.types.items()} == {
        "even": (3, pytest.approx(1 / 3)),
        "odd": (2, 1.0),
    }
    assert (report.scores.images, report.bad_rows, report.rows) == (3, [], 5)
    tokens = [assistant.layout(folder / f"{i}.png").num_visual for i in range(3)]
    assert report.visual_tokens == (pytest.approx(sum(tokens) / 3), sorted(tokens)[1])
    assert sorted(report.seen) == [((40, 60), None), ((40, 70), None), ((40, 80), None)]


@pytest.mark.parametrize("is_whole", [False, True])
def test_rows_are_looked_at_closely_where_they_say_so(assistant, folder, write, is_whole):
    reader = copy(assistant)
    reader.boxes_are_regions = True
    asked = {"image": "0.png", "question": "Read [0.1, 0.2, 0.4, 0.5]", "answers": ["A"]}
    rows = [asked, {**asked, "question": "What?", "region": [0.1, 0.2, 0.4, 0.5]}]
    run(reader, write(*rows), folder / "out", whole_images=is_whole)
    image = folder / "0.png"
    width, height = Image.open(image).size
    region = (int(0.1 * width), int(0.2 * height), round(0.4 * width), round(0.5 * height))
    told = None if is_whole else region
    for row, line in zip(rows, lines(folder / "out"), strict=True):
        assert line["prediction"] == assistant.ask(image, row["question"], region=told, max_new_tokens=4)
        assert line["visual_tokens"] == [assistant.layout(image, region=told).num_visual]
    assert reader.boxes_are_regions  # the caller's is as it was
    with pytest.raises(ValueError, match="whole_images was"):
        run(reader, write(*rows), folder / "out", whole_images=not is_whole)


def test_the_command_shows_images_whole_where_it_is_told_to(model_folder, folder, write):
    row = {"image": "0.png", "question": "What?", "answers": ["A"], "region": [0.1, 0.2, 0.4, 0.5]}
    data, seen = str(write(row)), []
    for options in ([], ["--no-region"]):
        out = folder / f"out{len(options)}"
        command = ["evaluate", str(model_folder), data, "--metric", "reading", "--output", str(out), *options]
        assert cli.main(command) == 0
        seen += [lines(out)[0]["visual_tokens"]]
    assert seen[1] == [load(model_folder).layout(folder / "0.png").num_visual] != seen[0]


def test_the_report_says_all_of_it_in_both_forms(assistant, folder, write):
    rows = [row | {"type": "a|b"} if row["type"] == "odd" else row for row in questions(4)]
    report = run(assistant, write(*rows, "{"), folder / "out", name="tiny")
    told = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    assert told["score"] == report.scores.score
    assert told["interval"] == list(report.scores.interval)
    assert told["types"]["a|b"]["questions"] == 2
    assert told["bad_rows"][0]["where"] == "line 5"
    assert told["seconds"]["mean"] == report.seconds.mean
    assert told["model"] == {"name": "tiny", "commit": None}
    assert told["settings"]["max_new_tokens"] == 4
    assert {"stepwell", "torch", "transformers"} <= told["versions"].keys()
    page = (folder / "out" / "report.md").read_text("utf-8")
    assert rf"| a\|b | 2 | {report.types['a|b'].score:.4f} |" in page
    assert "- Bad rows: 1 of 5, which are in no score\n  - line 5: not JSON" in page
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "answers.jsonl",
        "report.json",
        "report.md",
        "settings.json",
    ]


def test_a_second_run_asks_what_is_left_and_drops_half_a_line(assistant, folder, write, monkeypatch):
    data, output = write(*questions(6)), folder / "out"
    first = run(assistant, data, output)
    whole = (output / "answers.jsonl").read_text("utf-8")
    kept = "".join(whole.splitlines(keepends=True)[:3])
    (output / "answers.jsonl").write_text(kept + whole[len(kept) :][:40], "utf-8")
    asked = []
    answer = type(assistant).ask_many

    def counted(self, questions, **options):
        asked.extend(questions)
        return answer(self, questions, **options)

    monkeypatch.setattr(type(assistant), "ask_many", counted)
    done = []  # rows that are done, of all, and those that are on the disk by then
    again = run(assistant, data, output, progress=lambda *count: done.append((*count, len(lines(output)))))
    assert done == [(5, 6, 5), (6, 6, 6)]
    assert [text for _, text in asked] == [f"What is number {i}?" for i in (3, 4, 5)]
    assert again.scores == first.scores
    assert [line["prediction"] for line in lines(output)] == [
        json.loads(line)["prediction"] for line in whole.splitlines()
    ]
    assert "".join((output / "answers.jsonl").read_text("utf-8").splitlines(keepends=True)[:3]) == kept
    run(assistant, data, output)
    assert len(asked) == 3


def test_a_shorter_run_goes_on_to_a_larger_limit(assistant, folder, write):
    data = write(*questions(5))
    assert run(assistant, data, folder / "out", limit=2).scores.questions == 2
    before = lines(folder / "out")
    assert run(assistant, data, folder / "out").scores.questions == 5
    assert lines(folder / "out")[:2] == before
    assert run(assistant, data, folder / "out", limit=3, batch_size=3).scores.questions == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens was 4 and is 5"),
        ({"suffix": "SHORT"}, 'suffix was null and is "Answer the question'),
        ({"metric": "exact"}, 'metric was "anls" and is "exact"'),
        ({"official": True}, "official was false and is true"),
        ({"images": "."}, "images was"),
    ],
)
def test_other_settings_are_refused(assistant, folder, write, changes, told):
    data = write(*questions(2))
    run(assistant, data, folder / "out")
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    with pytest.raises(
        ValueError, match=r"holds the answers of another run: .*; name another folder"
    ) as caught:
        run(assistant, data, folder / "out", **changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_other_data_and_another_model_are_refused(assistant, folder, write):
    run(assistant, write(*questions(2)), folder / "out")
    with pytest.raises(ValueError, match="another run: data was"):
        run(assistant, write(*questions(3)), folder / "out")
    data = write(*questions(2))
    weight = assistant.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 1
        try:
            with pytest.raises(ValueError, match="another run: weights was"):
                run(assistant, data, folder / "out")
        finally:
            weight.copy_(kept)
    (folder / "out" / "settings.json").write_text("[")
    with pytest.raises(ValueError, match=r"settings.json cannot be read; name another folder"):
        run(assistant, data, folder / "out")


def test_another_look_precision_or_template_is_refused(assistant, model_folder, folder, write, monkeypatch):
    data = write(*questions(1))
    run(assistant, data, folder / "out")
    for changes, told in (
        ({"vision": {"sizes": [64, 128]}}, "geometry was"),
        ({"dtype": "bfloat16"}, 'dtype was "float32" and is "bfloat16"'),
    ):
        with pytest.raises(ValueError, match=told):
            run(load(model_folder, device="cpu", **changes), data, folder / "out")
    monkeypatch.setattr(type(assistant.engine), "chat_template", "another")
    with pytest.raises(ValueError, match="template was"):
        run(assistant, data, folder / "out")


def test_seconds_are_a_questions_share_of_its_batch(assistant, folder, write, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([0.0, 3.0, 10.0, 11.0]).__next__)
    monkeypatch.setattr("stepwell.evaluate.run.time", clock)
    run(assistant, write(*questions(3)), folder / "out")
    assert [line["seconds"] for line in lines(folder / "out")] == [1.5, 1.5, 1.0]


def test_weights_are_known_again_whatever_engine_holds_them(assistant, model_folder):
    light = load_light(model_folder, device=torch.device("cpu"))
    assert digest_of_weights(light) == digest_of_weights(assistant)


def test_bad_rows_are_told_and_in_no_score(assistant, folder, write):
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    good = questions(2)
    data = write(
        good[0],
        "{",
        {**good[1], "image": "cut.png"},
        {**good[1], "image": "missing.png"},
        {**good[1], "answers": None},
        {**good[1], "image": "https://a/b.png"},
        good[1],
    )
    report = run(assistant, data, folder / "out", batch_size=8)
    assert [bad.where for bad in report.bad_rows] == [f"line {i}" for i in (2, 3, 4, 5, 6)]
    reasons = [bad.reason for bad in report.bad_rows]
    assert "missing.png: no such file or directory" in reasons[2]
    assert all(reason and "\n" not in reason for reason in reasons)
    assert (report.scores.questions, report.rows) == (2, 7)
    assert [line["entry"] for line in lines(folder / "out")] == [0, 6]
    os.replace(folder / "0.png", folder / "missing.png")
    again = run(assistant, data, folder / "out")
    assert [bad.where for bad in again.bad_rows] == [f"line {i}" for i in (2, 3, 5, 6)]


def test_nothing_but_bad_rows_has_a_report_without_a_score(assistant, folder, write):
    report = run(assistant, write("{"), folder / "out")
    assert (report.scores, report.seconds, report.rows) == (None, None, 1)
    assert json.loads((folder / "out" / "report.json").read_text())["score"] is None


def test_what_cannot_be_meant_is_refused_at_once(assistant, folder, write):
    data = write(*questions(1))
    with pytest.raises(ValueError, match="unknown metric 'bleu'; choose from exact, anls"):
        run(assistant, data, folder / "out", metric="bleu")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run(assistant, data, folder / "out", batch_size=0)
    assert not (folder / "out").exists()


def test_choices_are_shown_with_the_question(assistant, folder, write):
    data = write({**questions(1)[0], "choices": ["dog", "fox"], "answers": "fox"})
    run(assistant, data, folder / "out", metric="choice", suffix="LETTER")
    (line,) = lines(folder / "out")
    assert line["question"] == f"What is number 0?\nA. dog\nB. fox\n{SUFFIXES['LETTER']}"


def test_the_command_prints_a_table_and_ends_with_bad_rows(model_folder, folder, write, capsys, monkeypatch):
    data = write(*questions(3))
    command = ["evaluate", str(model_folder), str(data), "--metric", "exact", "--max-new-tokens", "3"]
    monkeypatch.chdir(folder)
    assert cli.main([*command, "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["questions", "of", "type", "number", "exact", "95", "%", "interval"]
    assert out[2].split()[:2] == ["all", "3"]
    assert out[-1].endswith("data-exact/report.md")
    assert (folder / out[-1]).is_file()
    data = write(*questions(3), {"image": "0.png", "question": "?"})
    assert cli.main([*command, "--output", str(folder / "out"), "--batch", "2"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("stepwell: 1 of 4 rows are bad and in no score (all are in ")
    assert "; line 4: it has no answers; write" in err
    assert "Bad rows: 1 of 4" in out


def test_images_are_opened_within_the_limits_that_a_refusal_names(model_folder, folder, write, capsys):
    Image.new("RGB", (402, 2)).save(folder / "wide.png")
    data = write({**questions(1)[0], "image": "wide.png"})
    command = ["evaluate", str(model_folder), str(data), "--metric", "anls", "--max-new-tokens", "1"]
    for more in ([], ["--sizes", "64"]):
        at = [*command, "--output", str(folder / f"out{len(more)}"), *more, "--device", "cpu"]
        assert cli.main(at) == 2
        assert "--max-aspect 201 on the command line" in capsys.readouterr().err
        assert cli.main([*at, "--max-aspect", "201"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--metric", "anls", "--sizes", "64,x"], "--sizes are pixels with commas between them"),
        (["--metric", "anls", "--sizes", "64,64"], "each once"),
        (["--metric", "bleu"], "bleu"),
        ([], "--metric"),
        (["--metric", "anls", "--limit", "0"], "--limit"),
        (["--metric", "anls", "--images", "nowhere"], "nowhere"),
        (["--metric", "anls", "--device", "tpu"], "unknown device tpu"),
    ],
)
def test_refusals_of_the_command_are_one_line(write, capsys, arguments, reason):
    assert cli.main(["evaluate", "reader_tiny", str(write(*questions(1))), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert reason in err


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(model_folder, folder, write):
    """A real process, killed when some of its answers are there; then the same command again."""
    data, output = write(*questions(40)), folder / "out"
    command = [sys.executable, "-m", "stepwell", "evaluate", str(model_folder), str(data), "--metric", "anls"]
    command += ["--output", str(output), "--batch", "1", "--max-new-tokens", "16", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    answers, ends = output / "answers.jsonl", time.monotonic() + 240
    while time.monotonic() < ends and process.poll() is None:
        if answers.is_file() and answers.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    before = answers.read_bytes()
    assert 3 <= before.count(b"\n") < 40
    assert not (output / "report.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    whole = before[: before.rindex(b"\n") + 1]
    assert answers.read_bytes().startswith(whole)
    assert [line["entry"] for line in lines(output)] == [*range(40)]
    assert json.loads((output / "report.json").read_text())["all"]["questions"] == 40
