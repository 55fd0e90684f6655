"""Samples that cannot be used: left out, counted and named, or refused, as the recipe says."""

from __future__ import annotations

import csv
import json
import re

import pytest
from PIL import Image
from two_processes import run_in_two

from stepwell import cli
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train
from stepwell.train.stage_trainer import StageTrainer

GOOD = {
    "image": "good.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A CAT"}],
}
MISSING = {**GOOD, "image": "nowhere.png"}
EMPTY = {**GOOD, "conversations": [GOOD["conversations"][0], {"from": "gpt", "value": ""}]}


@pytest.fixture
def recipe(tmp_path):
    """recipe(*entries, steps=n) -> overrides of reader_smoke, whose second stage learns from them."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "good.png")

    def overrides(*entries, steps=6, name="talk"):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        data = [{"kind": "conversations", "path": str(tmp_path / f"{name}.json")}]
        stage = {"steps": steps, "batch": 1, "turns": "together", "losses": {"language": 1.0}, "data": data}
        return [
            *(f"output={tmp_path}/runs", "bf16=false", "stages.look.steps=1", "save_steps=1"),
            *(f"stages.answer.{field}={json.dumps(value)}" for field, value in stage.items()),
        ]

    return overrides


def killed_after(steps, monkeypatch, settings):
    """A run that is stopped behind so many steps, of both stages."""
    step, left = StageTrainer.training_step, iter(range(steps))

    def until_killed(self, *arguments, **named):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train("reader_smoke", settings)


def rows(folder, stage="2_answer"):
    with (folder / "runs/reader_smoke" / stage / "bad_samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_left_out_counted_and_named(tmp_path, recipe, workers, caplog):
    train("reader_smoke", [*recipe(GOOD, MISSING, GOOD, EMPTY), f"workers={workers}"])
    met = {(row["source"], row["place"], row["where"], row["reason"]) for row in rows(tmp_path)}
    file = tmp_path / "talk.json"
    assert met == {
        ("0", "1", f"{file}, entry 1", f"{tmp_path / 'nowhere.png'}: no such file or directory"),
        ("0", "3", f"{file}, entry 3", "an answer is empty"),
    }
    assert "2 bad samples were left out" in caplog.text
    with (tmp_path / "runs/reader_smoke/2_answer/metrics.csv").open(newline="") as file:
        counts = [row["value"] for row in csv.DictReader(file) if row["metric"] == "bad_samples"]
    assert counts[-1] == "2"
    assert not (tmp_path / "runs/reader_smoke/1_look/bad_samples.csv").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (
            "bad_samples=refuse",
            "talk.json, entry 1: .*nowhere.png: no such file or directory; mend it, take it out",
        ),
        (
            "bad_samples_limit=20",
            "1 of 4 samples of a source are bad, more than bad_samples_limit \\(20 %\\)",
        ),
    ],
)
def test_a_recipe_may_refuse_them(tmp_path, recipe, capsys, workers, setting, complaint):
    overrides = [*recipe(GOOD, MISSING, GOOD, GOOD), f"workers={workers}", setting]
    arguments = [part for override in overrides for part in ("--set", override)]
    assert cli.main(["train", "reader_smoke", *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("stepwell: ")
    assert re.search(complaint, last)
    assert not (tmp_path / "runs/reader_smoke/2_answer/finished").exists()


def test_a_limit_that_is_kept_refuses_nothing(tmp_path, recipe):
    train("reader_smoke", [*recipe(GOOD, MISSING, GOOD, GOOD, steps=8), "bad_samples_limit=25"])
    assert len(rows(tmp_path)) == 1


def test_refuse_takes_no_limit():
    with pytest.raises(ValueError, match="bad_samples_limit is of bad_samples: skip"):
        load_recipe("reader_smoke", ["bad_samples=refuse", "bad_samples_limit=3"])


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_used_ends_the_run_in_a_line(tmp_path, recipe, workers):
    with pytest.raises(
        ValueError, match=r"no sample of a source can be used; .*talk\.json, entry \d+: an answer is"
    ):
        train("reader_smoke", [*recipe(EMPTY, EMPTY), f"workers={workers}"])
    assert {row["place"] for row in rows(tmp_path)} == {"0", "1"}


def test_the_source_that_has_nothing_is_named_among_others(tmp_path, recipe):
    overrides = recipe(GOOD, MISSING, steps=8)
    (tmp_path / "none.json").write_text(json.dumps([EMPTY, EMPTY]))
    paths = [str(tmp_path / f"{name}.json") for name in ("talk", "none")]
    data = [{"kind": "conversations", "path": path} for path in paths]
    settings = [*overrides, f"stages.answer.data={json.dumps(data)}", "stages.answer.batch=8"]
    with pytest.raises(
        ValueError, match=r"no sample of a source can be used; the first, .*none\.json, entry"
    ):
        train("reader_smoke", settings)


@pytest.mark.parametrize("rule", ["bad_samples=refuse", "bad_samples_limit=20"])
def test_a_resumed_stage_keeps_to_the_rule_of_now(recipe, monkeypatch, rule):
    settings = [*recipe(GOOD, MISSING, GOOD, GOOD, steps=5), "workers=0"]
    killed_after(5, monkeypatch, settings)
    with pytest.raises(ValueError, match=r"talk\.json, entry 1: "):
        train("reader_smoke", [*settings, rule])


def test_a_name_that_is_no_text_is_counted_once_through_a_resume(tmp_path, recipe, monkeypatch):
    named = [{**GOOD, "image": f"\udcff{i}.png"} for i in range(3)]
    settings = [*recipe(GOOD, *named, steps=6), "workers=0", "bad_samples_limit=75"]
    killed_after(5, monkeypatch, settings)
    train("reader_smoke", settings)
    assert sorted(row["place"] for row in rows(tmp_path)) == ["1", "2", "3"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_stage_counts_on(tmp_path, recipe, monkeypatch, workers):
    bad = [EMPTY, MISSING] * 3
    settings = [*recipe(*[GOOD] * 3, *bad, steps=10), f"workers={workers}"]
    train("reader_smoke", settings)
    through = rows(tmp_path)
    assert len(through) == 6
    steps = [int(row["step"]) for row in through]
    assert min(steps) == 1 < max(steps) <= 10
    settings[0] = f"output={tmp_path}/again/runs"
    last = max(number for number in steps if number < max(steps))  # of a step at which one was met
    killed_after(last + 1, monkeypatch, settings)
    assert 0 < len(rows(tmp_path / "again")) < 6
    train("reader_smoke", settings)
    assert rows(tmp_path / "again") == through


def test_validation_is_of_the_good_samples(tmp_path, recipe):
    overrides = recipe(GOOD, steps=1)
    entries = [
        MISSING,
        GOOD,
        EMPTY,
        EMPTY,
        {**GOOD, "conversations": [GOOD["conversations"][0], {"from": "gpt", "value": "NO"}]},
    ]
    measured = {}
    for name, held_out in (("all", entries), ("good", [entries[1], entries[4]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(held_out))
        data = json.dumps([{"kind": "conversations", "path": str(tmp_path / f"{name}.json")}])
        overrides[0] = f"output={tmp_path}/{name}/runs"
        train("reader_smoke", [*overrides, f"stages.answer.validation={data}"])
        with (tmp_path / name / "runs/reader_smoke/2_answer/metrics.csv").open(newline="") as file:
            measured[name] = {row["metric"]: row["value"] for row in csv.DictReader(file)}
    assert measured["all"]["eval_loss"] == measured["good"]["eval_loss"]
    assert {(row["source"], row["place"]) for row in rows(tmp_path / "all")} == {
        ("1", "0"),
        ("1", "2"),
        ("1", "3"),
    }


def test_validation_data_of_which_nothing_can_be_used_is_no_best(tmp_path, recipe):
    (tmp_path / "bad.json").write_text(json.dumps([EMPTY, MISSING]))
    data = json.dumps([{"kind": "conversations", "path": str(tmp_path / "bad.json")}])
    with pytest.raises(ValueError, match=r"stages\.answer\.validation has no sample that can be used"):
        train("reader_smoke", [*recipe(GOOD, steps=1), f"stages.answer.validation={data}"])


def test_what_a_coco_file_has_wrong_is_told_before_the_first_step(tmp_path, recipe):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "page.png")
    line = {"id": 5, "image_id": 1, "bbox": [10, 10, 100, 20], "text": "TOTAL"}
    lines = [line, {**line, "bbox": [10, 10, 0, 20]}, {**line, "id": 6, "text": None}]
    file = {"images": [{"id": 1, "file_name": "page.png"}], "annotations": lines}
    (tmp_path / "coco.json").write_text(json.dumps(file))
    data = [{"kind": "text_lines", "path": str(tmp_path / "coco.json"), "images": str(tmp_path)}]
    settings = [*recipe(GOOD, steps=1)[:-1], f"stages.answer.data={json.dumps(data)}"]
    train("reader_smoke", settings)
    assert [(row["step"], row["where"].split(", ", 1)[1]) for row in rows(tmp_path)] == [
        ("0", "annotations[1], id 5"),
        ("0", "image page.png (id 1), annotation 6"),
    ]
    with pytest.raises(ValueError, match=r"annotations\[1\], id 5: its bbox .* has no width; mend it"):
        train("reader_smoke", [*settings, "bad_samples=refuse", "resume=false"])


SCRIPT = """
import sys
from stepwell.train.run import train

train("reader_smoke", sys.argv[1:])
"""


@pytest.mark.slow
def test_processes_name_each_others_bad_samples(tmp_path, recipe):
    """Of eight samples in eight steps, each process meets some."""
    settings = [*recipe(*[GOOD, EMPTY] * 4, steps=8), "workers=1"]
    run_in_two(SCRIPT, tmp_path, *settings, "bad_samples=skip", "resume=false")
    assert {row["place"] for row in rows(tmp_path)} == {"1", "3", "5", "7"}
    run = run_in_two(SCRIPT, tmp_path, *settings, "bad_samples_limit=40", "resume=false", fails=True)
    assert "4 of 8 samples of a source are bad" in run.stderr
