"""Systems side by side: each trained, asked and costed as it would be alone."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import yaml

from stepwell import cli
from stepwell.commands.compare import _system
from stepwell.evaluate.compare import System, as_tables, compare
from stepwell.evaluate.costs import vision_costs
from stepwell.evaluate.run import evaluate
from stepwell.models.plain import PlainConfig
from stepwell.train.run import train
from stepwell.weights.load import load

ROWS = [
    {"image": f"{i}.png", "question": "What?", "answers": ["x"], "type": kind}
    for i, kind in ((0, "small"), (1, "large"), (2, "large"))
]


@pytest.fixture
def plain_folder(save, tmp_path):
    return save(PlainConfig(encoder="vit_nano", size=32), tmp_path / "plain")


@pytest.mark.slow
def test_systems_are_set_side_by_side(model_folder, plain_folder, write, folder):
    data, output = write(*ROWS), folder / "out"
    systems = [System(path.name, model=str(path)) for path in (model_folder, plain_folder)]
    told = []
    ballast = np.ones(3 * 2**27)  # 3 GiB
    found = compare(
        systems,
        data,
        metric="reading",
        output=output,
        load=load,
        train=train,
        device="cpu",
        tell=told.append,
        max_new_tokens=2,
    )
    assert told == [f"{path.name}: asking {path}" for path in (model_folder, plain_folder)]
    assert [(each.name, each.kind) for each in found] == [("tiny", "piip"), ("plain", "plain")]
    entries = json.loads((output / "compare.json").read_text())
    page = (output / "compare.md").read_text()
    for path, each, entry in zip((model_folder, plain_folder), found, entries, strict=True):
        alone = load(path, device="cpu")
        report = evaluate(
            alone, data, metric="reading", output=folder / "alone" / path.name, max_new_tokens=2
        )
        assert each.report.scores == report.scores
        assert each.report.types == report.types
        assert each.costs == vision_costs(alone, report.seen)
        assert each.parameters == alone.model.num_parameters()
        assert 0.1 < each.gibibytes < ballast.nbytes / 2**30  # of the process that answers, not of this one
        assert entry["score"] == report.scores.score
        assert entry["true_gflops"] == each.costs.true_gflops
        assert entry["types"]["large"]["measures"] == report.types["large"].measures
        assert f"| {each.name} | {each.kind} | {each.parameters / 1e6:.2f} |" in page
    table = as_tables("reading", found)
    assert [table.count(name) for name in ("exact", "characters", "large", "small")] == [1, 1, 2, 2]


@pytest.mark.slow
def test_recipes_are_trained_and_what_is_done_is_taken_as_it_is(model_folder, write, folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = {"base": "reader_smoke", "name": "mine", "bf16": False}
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    data = write(*ROWS)
    command = ["compare", "mine.yaml", str(model_folder), "--data", str(data), "--max-new-tokens", "2"]
    command += ["--set", "stages.look.steps=1", "--set", "stages.answer.steps=1", "--device", "cpu"]
    assert cli.main(command) == 0
    output = folder / "comparisons/data-reading"
    entries = json.loads((output / "compare.json").read_text())
    assert [entry["name"] for entry in entries] == ["mine", "tiny"]
    assert (output / "compare.png").stat().st_size > 10_000
    assert (folder / "runs/mine/model/model.safetensors").is_file()
    before = (folder / "runs/mine/2_answer/finished/model.safetensors").stat().st_mtime_ns
    answers = (output / "mine/answers.jsonl").read_text()  # with the seconds that they took
    assert cli.main(command) == 0
    assert (folder / "runs/mine/2_answer/finished/model.safetensors").stat().st_mtime_ns == before
    assert (output / "mine/answers.jsonl").read_text() == answers
    again = json.loads((output / "compare.json").read_text())
    assert [entry["gibibytes"] for entry in again] == [entry["gibibytes"] for entry in entries]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing"], "no recipe and no model folder: nothing; `stepwell list recipes` names recipes"),
        (["reader_smoke", "reader_smoke"], "two systems are called reader_smoke"),
        (["reader_smoke", "--set", "stages.look.steps=none"], "stages.0.steps"),
        (["detect"], "recipe detect is of the task detect, whose models answer no questions"),
        (["reader_tiny", "--set", "a=b"], "--set is of recipes, and models alone are compared"),
        (["boards_tiny"], "boards_tiny answers no questions: it is a"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(arguments, complaint, write, capsys):
    assert cli.main(["compare", *arguments, "--data", str(write(*ROWS))]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_system_is_trained_or_a_model(write, folder):
    options = {"metric": "reading", "output": folder / "out", "load": load}
    with pytest.raises(ValueError, match="system a has either a recipe or a model"):
        compare([System("a")], write(*ROWS), **options)
    with pytest.raises(ValueError, match="system a has to be trained: give train"):
        compare([System("a", recipe="reader_smoke")], write(*ROWS), **options)


def test_a_shipped_model_is_a_model_though_its_recipe_has_its_name(folder):
    assert _system("reader_tiny", ()).model == "reader_tiny"
    (folder / "mine.yaml").write_text("base: reader_smoke\nname: mine\n")
    system = _system(str(folder / "mine.yaml"), ())
    assert (system.name, system.model) == ("mine", None)


def test_what_regions_cost_is_counted():
    model = load("reader_tiny", device="cpu")
    whole, region = (vision_costs(model, [((1600, 800), each)]) for each in (None, (100, 100, 500, 140)))
    assert region.true_gflops < whole.true_gflops / 5


def gone(*args, **kwargs):
    os._exit(9)


@pytest.mark.slow
def test_a_process_that_is_gone_is_told_in_a_line(write, folder):
    with pytest.raises(RuntimeError, match="the process that did the work is gone"):
        compare([System("a", model="x")], write(*ROWS), metric="reading", output=folder / "out", load=gone)


def test_questions_that_are_not_there_are_refused(capsys):
    assert cli.main(["compare", "reader_smoke", "--data", "nowhere.jsonl"]) == 2
    assert "no such file: nowhere.jsonl" in capsys.readouterr().err
