"""A recipe from start to finish, in seconds."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor
from stepwell.reader.task import ReaderTask
from stepwell.train.groups import part_of
from stepwell.train.recipe import load_recipe
from stepwell.train.run import StageTrainer, mixture, train


def stage_trainer(folder, *overrides):
    """The trainer of reader_smoke's second stage."""
    recipe = load_recipe("reader_smoke", ["bf16=false", *overrides])
    task = ReaderTask(recipe, recipe.stages[1])
    source = mixture(task, recipe.stages[1], seed=0)
    return StageTrainer(task.build(), task, recipe, recipe.stages[1], source, folder, seed=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, train("reader_smoke", [f"output={folder}", "bf16=false"])


def test_a_trained_folder_answers(finished):
    _, folder = finished
    model = StepwellForConditionalGeneration.from_pretrained(folder)
    assistant = Assistant(model, StepwellProcessor.from_pretrained(folder))
    assert model.dtype == torch.float32
    assert isinstance(assistant.ask(Image.new("RGB", (90, 60)), "What?", max_new_tokens=3), str)


def test_training_only_heads_stay_out_of_the_model(finished):
    runs, folder = finished
    assert not any("line_head" in name for name in load_file(folder / "model.safetensors"))
    assert any(
        "line_head" in name for name in load_file(runs / "reader_smoke/1_look/finished/model.safetensors")
    )


def test_a_stage_trains_its_parts_only(finished):
    runs, _ = finished
    recipe = load_recipe("reader_smoke")
    task = ReaderTask(recipe, recipe.stages[0])
    module = task.build()
    fresh, parts = module.state_dict(), task.parts(module)
    first, second = (
        load_file(runs / f"reader_smoke/{name}/finished/model.safetensors") for name in ("1_look", "2_answer")
    )
    assert all(first[name].shape == fresh[name].shape for name in fresh if name in first)
    changed = {
        part_of(name, parts).split(".")[0] for name in first if not torch.equal(first[name], second[name])
    }
    assert changed == {"vision", "projector", "language", "line_head"}


def test_finished_stages_are_taken_up_again(finished):
    runs, folder = finished
    before = load_file(folder / "model.safetensors")
    steps = (runs / "reader_smoke/2_answer/finished/model.safetensors").stat().st_mtime_ns
    train("reader_smoke", [f"output={runs}", "bf16=false"])
    after = load_file(folder / "model.safetensors")
    assert (runs / "reader_smoke/2_answer/finished/model.safetensors").stat().st_mtime_ns == steps
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    settings = ["bf16=false", "save_steps=1", "stages.look.steps=3", "stages.answer.steps=1"]
    through = train("reader_smoke", [*settings, f"output={tmp_path}/through"])
    steps = iter(range(2))
    whole = StageTrainer.training_step

    def until_killed(self, *args, **kwargs):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train("reader_smoke", [*settings, f"output={tmp_path}/killed"])
    assert (tmp_path / "killed/reader_smoke/1_look/checkpoint-2").is_dir()
    resumed = train("reader_smoke", [*settings, f"output={tmp_path}/killed"])
    one, other = (load_file(folder / "model.safetensors") for folder in (through, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_optimiser_schedule_and_trainer_arguments_are_the_stages(tmp_path):
    trainer = stage_trainer(
        tmp_path,
        "stages.answer.optimiser={name: sgd, lr: 0.5, part_lrs: {vision: 0.25}, weight_decay: 0.0}",
        "stages.answer.schedule.name=warmup_stable_decay",
        "stages.answer.schedule.warmup_steps=2",
        "stages.answer.schedule.arguments={num_decay_steps: 4}",
        "stages.answer.trainer={save_total_limit: 2}",
        "stages.answer.steps=10",
    )
    trainer.create_optimizer_and_scheduler(10)
    assert type(trainer.optimizer) is torch.optim.SGD
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.5, 0.25}
    rates = []
    for _ in range(10):
        rates.append(
            round(
                trainer.optimizer.param_groups[0]["lr"] / trainer.optimizer.param_groups[0]["initial_lr"], 3
            )
        )
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:7] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert 1 > rates[7] > rates[8] > rates[9] > 0
    assert trainer.args.save_total_limit == 2
    assert trainer.args.accelerator_config.dispatch_batches is False


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stages.answer.trainer={max_steps: 3}", "stages.answer.trainer.max_steps is set by another field"),
        ("stages.answer.trainer={warmup: 3}", "stages.answer: TrainingArguments: .*'warmup'"),
        ("stages.answer.optimiser.name=adamm", "stages.answer: TrainingArguments: .*adamm"),
        ("stages.answer.vision={sizes: [64]}", r"2 views, got \[64\]"),
        ("stages.answer.vision={interaction: 3}", "vision.interaction of a 'piip' system cannot change"),
    ],
)
def test_what_a_stage_cannot_have_is_refused_in_one_line(tmp_path, override, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        stage_trainer(tmp_path, override)
    assert "\n" not in str(refusal.value)


def test_losses_are_weighed_as_the_stage_says(tmp_path):
    trainer = stage_trainer(tmp_path, "stages.answer.losses={language: 2.0, frames: 0.5}")
    batch = trainer.task.collate([trainer.train_dataset[0]])
    losses = trainer.task.losses(trainer.model, batch)
    total = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(total, 2.0 * losses["language"] + 0.5 * losses["frames"])


def test_data_that_is_not_there_stops_a_run_before_it_starts(tmp_path):
    missing = '{"kind": "conversations", "path": "nowhere.json"}'
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        train("reader_smoke", [f"output={tmp_path}", f"stages.answer.data=[{missing}]"])
    assert not list(tmp_path.iterdir())


def test_a_missing_accelerate_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[train\]'"):
        train("reader_smoke")
