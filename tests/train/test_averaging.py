"""Averages of weights over the steps of a training."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tiny import killed_after, metrics_of, recipe_of, weights_of, write_data
from torch import nn

from stepwell.train import perception
from stepwell.train.averaging import Averaging
from stepwell.train.recipe import Average, load_recipe
from stepwell.train.run import mixture, train
from stepwell.train.stage_trainer import StageTrainer
from stepwell.train.tasks import find_task


class Stage:
    """What Trainer tells its callbacks of a module that changes at every step."""

    def __init__(self, module, folder, **settings):
        self.module, self.folder = module, folder
        self.averaging = Averaging(module, Average(**settings))
        self.args = SimpleNamespace(device="cpu", output_dir=str(folder), should_save=True)
        self.state = SimpleNamespace(global_step=0)

    def begin(self, step=0):
        self.state.global_step = step
        self.averaging.on_train_begin(self.args, self.state, None)
        return self

    def steps(self, weights):
        for value in weights:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.copy_(value)
            self.state.global_step += 1
            self.averaging.on_step_end(self.args, self.state, None)

    def save(self):
        (self.folder / f"checkpoint-{self.state.global_step}").mkdir(parents=True, exist_ok=True)
        self.averaging.on_save(self.args, self.state, None)

    @property
    def weights(self):
        return [parameter.clone() for parameter in self.averaging.model.parameters()]


WEIGHTS = [torch.tensor(value) for value in (4.0, -2.0, 7.0, 1.0, 3.0, 9.0)]


def averaged(weights, decay, ramp):
    """By hand: the first as it is, then by parts of what was there before."""
    value = weights[0]
    for n, each in enumerate(weights[1:], 1):
        kept = min(decay, (1 + n) / (10 + n)) if ramp else decay
        value = kept * value + (1 - kept) * each
    return value


@pytest.mark.parametrize(("decay", "ramp"), [(0.9, False), (0.9, True), (0.2, True), (0.25, True)])
def test_an_average_is_the_loop_by_hand(tmp_path, decay, ramp):
    stage = Stage(nn.Linear(2, 1), tmp_path, decay=decay, ramp=ramp).begin()
    for n in range(1, len(WEIGHTS) + 1):
        stage.steps(WEIGHTS[n - 1 : n])
        for parameter in stage.weights:
            torch.testing.assert_close(
                parameter, averaged(WEIGHTS[:n], decay, ramp).expand_as(parameter), rtol=1e-6, atol=1e-6
            )
    assert stage.module.weight.unique().tolist() == [9.0]  # the module itself goes its way


def test_buffers_are_the_last(tmp_path):
    stage = Stage(nn.BatchNorm2d(2), tmp_path, decay=0.9).begin()
    for value in (3.0, 5.0):
        stage.module.running_mean.fill_(value)
        stage.steps(WEIGHTS[:1])
    assert stage.averaging.model.running_mean.tolist() == [5.0, 5.0]


def test_an_average_needs_no_gradients(tmp_path):
    stage = Stage(nn.Linear(2, 1), tmp_path).begin()
    assert not any(parameter.requires_grad for parameter in stage.averaging.model.parameters())
    assert all(parameter.requires_grad for parameter in stage.module.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_an_average_goes_on_where_it_was(tmp_path, tied):
    """Also of a module two of whose layers have the same weights."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    if tied:
        module[2].weight = module[0].weight
    whole = Stage(copy.deepcopy(module), tmp_path / "whole", decay=0.7).begin()
    whole.steps(WEIGHTS)
    first = Stage(copy.deepcopy(module), tmp_path / "killed", decay=0.7).begin()
    first.steps(WEIGHTS[:3])
    first.module[1].running_mean.fill_(8.0)
    first.steps(WEIGHTS[3:4])
    first.save()
    behind = Stage(first.module, tmp_path / "killed", decay=0.7).begin(step=4)
    assert behind.averaging.model[1].running_mean.tolist() == [8.0, 8.0]
    behind.steps(WEIGHTS[4:])
    for ours, theirs in zip(behind.weights, whole.weights, strict=True):
        assert torch.equal(ours, theirs)


def test_one_process_writes(tmp_path):
    stage = Stage(nn.Linear(2, 1), tmp_path).begin()
    stage.args.should_save = False
    stage.save()
    assert not any((tmp_path / "checkpoint-0").iterdir())


@pytest.mark.parametrize("fields", [{"decay": 1.0}, {"decay": 0.0}, {"decays": 0.5}])
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Average(**fields)


# In a training

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("shapes"), "classify")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    for place in ("train.results", "evaluate.perception_report"):
        monkeypatch.setattr(f"stepwell.{place}.can_draw", lambda: False)
    monkeypatch.setattr(perception, "PICTURES", 0)


def recipe(folder, data, *, use, keep="last", decay=0.5):
    average = {"decay": decay, "ramp": False, "use": use}
    stage = {"steps": STEPS, "average": average, "validation": [data], "validate_steps": 2, "keep": keep}
    return recipe_of("classify", folder, data, stages=stage, save_steps=2)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Stage folders of the same training, whose average is used, and lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        no_figures.__wrapped__(patch)
        folder = tmp_path_factory.mktemp("runs")
        trained = {use: train(recipe(folder / str(use), data, use=use)) for use in (True, False)}
    return {use: model.parent / "1_shapes" for use, model in trained.items()}


def test_what_lies_where(runs):
    assert not (runs[True] / "average").exists()
    used, plain, beside = (
        weights_of(folder)
        for folder in (runs[True] / "finished", runs[False] / "finished", runs[False] / "average")
    )
    assert plain.keys() == used.keys() == beside.keys()
    for name in used:
        assert torch.equal(used[name], beside[name]), name
    assert any(not torch.equal(used[name], plain[name]) for name in used)


def test_what_is_used_is_what_is_scored(runs, data):
    """The scores behind the last step are those of the weights that the stage ends with."""
    seen = {}
    examined = perception.PerceptionTask.examination

    def looking(self, module):
        seen[len(seen)] = {name: p.detach().clone() for name, p in module.named_parameters()}
        return examined(self, module)

    for use, stage in runs.items():
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(perception.PerceptionTask, "examination", looking)
            train(recipe(stage.parents[2], data, use=use), ["resume=false"])
        kept = weights_of(stage / "finished")
        last = seen[max(seen)]
        assert all(torch.equal(last[name], kept[name]) for name in last)


def test_losses_are_those_of_the_weights_that_are_kept(tmp_path):
    """Of a model that is judged by its losses: an average that has hardly moved is as bad as the start."""
    data = {"kind": "drawn", "sides": [128, 128], "text": [12, 16]}
    changes = {"average": {"decay": 0.999, "ramp": False}, "validation": [{**data, "count": 2}]}
    overrides = [f"stages.look.{name}={json.dumps(value)}" for name, value in changes.items()]
    settings = load_recipe("reader_smoke", [f"output={tmp_path}", "bf16=false", *overrides])
    task = find_task(settings.task)(settings, settings.stages[0])
    trainer = StageTrainer(task.build(), task, settings, mixture(task, seed=0), tmp_path / "stage", seed=0)
    trainer.train()
    told = trainer.evaluate()["eval_loss"]
    averaging, trainer.averaging = trainer.averaging, None
    last = trainer.evaluate()["eval_loss"]
    trainer.model.load_state_dict(averaging.model.state_dict())
    assert told == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert told != pytest.approx(last, rel=1e-3)


def test_a_training_that_was_stopped_has_the_same_average(runs, data, tmp_path):
    for use, stage in runs.items():
        path = recipe(tmp_path / str(use), data, use=use)
        killed_after(3, path)
        again = train(path).parent / "1_shapes"
        assert metrics_of(again)["eval_top1"] == metrics_of(stage)["eval_top1"]
        for name in ("finished", *(() if use else ("average",))):
            ours, theirs = weights_of(again / name), weights_of(stage / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
