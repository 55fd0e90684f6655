"""A recipe from start to finish, in seconds."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from two_processes import run_in_two

from stepwell.folders import SHIPPED
from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor
from stepwell.reader.recipe import ReaderModel
from stepwell.reader.task import ReaderTask
from stepwell.train.dry_run import dry_run
from stepwell.train.groups import part_of
from stepwell.train.processes import leave_group
from stepwell.train.recipe import load_recipe
from stepwell.train.run import mixture, train
from stepwell.train.stage_trainer import StageTrainer


def stage_trainer(folder, *overrides):
    """The trainer of reader_smoke's second stage."""
    recipe = load_recipe("reader_smoke", ["bf16=false", *overrides])
    task = ReaderTask(recipe, recipe.stages[1])
    source = mixture(task, seed=0)
    return StageTrainer(task.build(), task, recipe, source, folder, seed=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, train("reader_smoke", [f"output={folder}", "bf16=false"])


def test_a_trained_folder_answers(finished):
    _, folder = finished
    model = StepwellForConditionalGeneration.from_pretrained(folder)
    assistant = Assistant(model, StepwellProcessor.from_pretrained(folder))
    assert model.dtype == torch.float32
    assert model.generation_config.use_cache  # which Trainer switches off in what it trains
    assert isinstance(assistant.ask(Image.new("RGB", (90, 60)), "What?", max_new_tokens=3), str)


def test_a_model_that_is_not_written_to_its_end_does_not_replace_one(finished, tmp_path, monkeypatch):
    runs, folder = finished
    shutil.copytree(runs, tmp_path / "runs")
    model = tmp_path / "runs/reader_smoke/model"

    def die(self, weights, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ReaderTask, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train("reader_smoke", [f"output={tmp_path}/runs", "bf16=false"])
    assert equal_weights(folder, model)
    train("reader_smoke", [f"output={tmp_path}/runs", "bf16=false"])
    assert equal_weights(folder, model)
    assert sorted(path.name for path in model.parent.iterdir()) == [
        "1_look",
        "2_answer",
        "model",
        "recipe.yaml",
    ]


def test_only_the_first_process_writes_the_model(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/reader_smoke/model")
    monkeypatch.setenv("RANK", "1")
    folder = train("reader_smoke", [f"output={tmp_path}/runs", "bf16=false"])
    assert not folder.exists()


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


def test_finished_stages_are_taken_up_again(finished, capsys, monkeypatch):
    runs, folder = finished
    monkeypatch.setenv("WORLD_SIZE", "2")  # which matters to stages that go on alone
    before = load_file(folder / "model.safetensors")
    steps = (runs / "reader_smoke/2_answer/finished/model.safetensors").stat().st_mtime_ns
    train("reader_smoke", [f"output={runs}", "bf16=false"])
    after = load_file(folder / "model.safetensors")
    assert (runs / "reader_smoke/2_answer/finished/model.safetensors").stat().st_mtime_ns == steps
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "stage answer was finished before, and is taken as it is: " in capsys.readouterr().out


@pytest.mark.parametrize(("fast", "bf16", "told"), [(False, True, 1), (False, False, 0), (True, True, 0)])
def test_a_processor_that_is_slow_in_bf16_is_told_of(tmp_path, capsys, monkeypatch, fast, bf16, told):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(StageTrainer, "training_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("reader_smoke", [f"output={tmp_path}", f"bf16={bf16}"])
    assert capsys.readouterr().out.count("many times faster with bf16=false") == told


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stages.look.steps=3", "1_look was trained with stages.0.steps 2, which is 3 now"),
        ("stages.answer.optimiser.lr=0.5", "2_answer was trained with stages.1.optimiser.lr 0.001"),
        ("stages.answer.optimiser.part_lrs.projector=0.5", "part_lrs.projector None, which is 0.5 now"),
        ("stages.look.data.0.count=99", "1_look was trained with stages.0.data.0.count 100000"),
        ("model.text.hidden_size=64", "1_look was trained with model.text.hidden_size 32"),
        ("model.vision.min_cells=1", "1_look was trained with model.vision.min_cells 2"),
        ("seed=1", "1_look was trained with seed 42"),
        ("stages.look.trainer={adam_epsilon: 1.0e-3}", "1_look .* stages.0.trainer.adam_epsilon None"),
        (
            "stages.look.average={}",
            "1_look .* stages.0.average",
        ),  # all of it by default, where there was none
    ],
)
def test_a_finished_run_is_not_taken_for_that_of_another_recipe(finished, override, complaint):
    runs, _ = finished
    with pytest.raises(ValueError, match=f"{complaint}.*another output or name, delete") as refusal:
        train("reader_smoke", [f"output={runs}", "bf16=false", override])
    assert "\n" not in str(refusal.value)


def test_a_run_of_before_there_were_some_fields_is_that_of_their_defaults(finished, tmp_path):
    runs, folder = finished
    shutil.copytree(runs, tmp_path / "runs")
    for record in (tmp_path / "runs/reader_smoke").glob("*/recipe.json"):
        before = json.loads(record.read_text())
        for stage in before["stages"]:
            del stage["packed"], stage["averaging"], stage["optimiser"]["clip_steps"]
        record.write_text(json.dumps(before))
    again = train("reader_smoke", settings := [f"output={tmp_path / 'runs'}", "bf16=false"])
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"stages\.1\.packed None, which is True now"):
        train("reader_smoke", [*settings, "stages.answer.packed=true"])


def test_fields_that_no_weight_depends_on_may_change_and_stages_be_added(finished, tmp_path, monkeypatch):
    runs, _ = finished
    shutil.copytree(runs, tmp_path / "moved")
    recipe = load_recipe("reader_smoke").model_dump(mode="json", exclude_unset=True)
    recipe["stages"].append({**recipe["stages"][0], "name": "again"})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    trained = []
    monkeypatch.setattr(StageTrainer, "training_step", lambda self, *_, **__: trained.append(self) or kill())

    def kill():
        raise KeyboardInterrupt

    settings = [f"output={tmp_path}/moved", "bf16=false", "workers=1", "log_steps=7", "save_steps=3"]
    settings += ["save_dtype=float32", "stages.look.trainer={report_to: none, logging_first_step: true}"]
    folder = train("reader_smoke", settings)
    assert next(iter(load_file(folder / "model.safetensors").values())).dtype == torch.float32
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "mine.yaml", settings)
    assert [trainer.stage.name for trainer in trained] == ["again"]


def test_a_stage_that_stopped_does_not_go_on_by_another_recipe(tmp_path, monkeypatch):
    settings = [f"output={tmp_path}", "bf16=false"]
    save = StageTrainer.save_model

    def save_and_die(self, folder, **kwargs):
        save(self, folder, **kwargs)
        if "checkpoint" not in folder:
            raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "save_model", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train("reader_smoke", settings)
    assert not (tmp_path / "reader_smoke/1_look/finished").exists()
    with pytest.raises(ValueError, match=r"1_look was trained with stages\.0\.batch 2, which is 3 now"):
        train("reader_smoke", [*settings, "stages.look.batch=3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"1_look was trained with processes 1, which is 2 now"):
        train("reader_smoke", settings)


def test_stages_behind_one_that_is_trained_anew_are_trained_anew(finished, tmp_path):
    runs, folder = finished
    shutil.copytree(runs, tmp_path / "runs")
    later = tmp_path / "runs/reader_smoke/2_answer"
    (later / "of_before").touch()
    shutil.rmtree(tmp_path / "runs/reader_smoke/1_look")
    again = load_file(train("reader_smoke", [f"output={tmp_path}/runs", "bf16=false"]) / "model.safetensors")
    assert not (later / "of_before").exists()
    before = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)
    (later / "of_before").touch()
    train("reader_smoke", [f"output={tmp_path}/runs", "bf16=false", "resume=false", "seed=3"])
    assert not (later / "of_before").exists()


def test_a_model_is_saved_in_its_own_geometry_and_not_in_that_of_its_last_stage(tmp_path):
    sizes = ["stages.answer.vision={sizes: [64, 128]}", "stages.answer.steps=1", "stages.look.steps=1"]
    folder = train("reader_smoke", [f"output={tmp_path}", "bf16=false", *sizes])
    model = StepwellForConditionalGeneration.from_pretrained(folder)
    stage = json.loads((tmp_path / "reader_smoke/2_answer/finished/config.json").read_text())
    assert [branch.size for branch in model.config.vision.branches] == [128, 256]
    assert [branch["size"] for branch in stage["vision_config"]["branches"]] == [64, 128]


def killed_after(steps, monkeypatch, *arguments):
    """A training that ends in the step behind so many."""
    left = iter(range(steps))
    whole = StageTrainer.training_step

    def until_killed(self, *args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments)


def equal_weights(*folders):
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path, monkeypatch, workers):
    settings = ["bf16=false", "save_steps=1", "stages.look.steps=3", "stages.answer.steps=1"]
    settings += [f"workers={workers}"]
    through = train("reader_smoke", [*settings, f"output={tmp_path}/through"])
    killed_after(2, monkeypatch, "reader_smoke", [*settings, f"output={tmp_path}/killed"])
    assert (tmp_path / "killed/reader_smoke/1_look/checkpoint-2").is_dir()
    resumed = train("reader_smoke", [*settings, f"output={tmp_path}/killed"])
    assert equal_weights(through, resumed)


KILLED = """
import os, signal, sys
import torch
from stepwell.train.run import train

save = torch.save

def half(content, file, *arguments, **named):
    save(content, file, *arguments, **named)
    if "checkpoint-3" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
train("reader_smoke", sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_checkpoint_loses_that_one_alone(tmp_path, caplog):
    settings = ["bf16=false", "save_steps=1", "stages.look.steps=4", "stages.answer.steps=1"]
    through = train("reader_smoke", [*settings, f"output={tmp_path}/through"])
    settings.append(f"output={tmp_path}/killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, *settings], capture_output=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    stage = tmp_path / "killed/reader_smoke/1_look"
    assert (stage / "checkpoint-3").is_dir()
    assert not (stage / "finished").exists()
    resumed = train("reader_smoke", settings)
    assert "checkpoint-3 was not written to its end; it is passed over" in caplog.text
    assert equal_weights(through, resumed)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path, monkeypatch, caplog):
    settings = ["bf16=false", "save_steps=1", "stages.look.steps=4", "stages.answer.steps=1"]
    settings += [f"output={tmp_path}"]
    stage = tmp_path / "reader_smoke/1_look"

    def die(self, folder):
        (stage / "checkpoint-3/optimizer.pt").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # in the third checkpoint, behind the weights
        whole = StageTrainer._save_optimizer_and_scheduler
        patch.setattr(
            StageTrainer,
            "_save_optimizer_and_scheduler",
            lambda self, folder: (die if folder.endswith("-3") else whole)(self, folder),
        )
        with pytest.raises(KeyboardInterrupt):
            train("reader_smoke", settings)
    assert (stage / "checkpoint-3/model.safetensors").is_file()
    starts = []
    begin = StageTrainer.train
    monkeypatch.setattr(
        StageTrainer, "train", lambda self, **given: starts.append(given) or begin(self, **given)
    )
    resumed = train("reader_smoke", settings)
    assert starts[0] == {"resume_from_checkpoint": str(stage / "checkpoint-2")}
    assert "checkpoint-3 was not written to its end; it is passed over" in caplog.text
    monkeypatch.undo()
    through = train("reader_smoke", [*settings[:-1], f"output={tmp_path}/through"])
    assert equal_weights(through, resumed)


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


VALIDATED = [
    "bf16=false",
    "save_steps=2",
    "stages.look.steps=5",
    "stages.look.validate_steps=2",
    "stages.look.validation=[{kind: drawn, count: 3, seed: 9, sides: [128, 128], text: [12, 16]}]",
    "stages.answer.steps=1",
]


def test_validation_losses_are_measured_and_the_best_weights_kept(tmp_path, monkeypatch):
    losses = iter([0.5, 0.25, 0.75])
    weights = []

    def measured(self):
        weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        return {"frames": next(losses)}

    monkeypatch.setattr(StageTrainer, "_validation_means", measured)
    train("reader_smoke", [*VALIDATED, f"output={tmp_path}"])
    stage = tmp_path / "reader_smoke/1_look"
    rows = read_metrics(stage)
    assert [(r["step"], r["value"]) for r in rows if r["metric"] == "eval_loss"] == [
        ("2", "0.5"),
        ("4", "0.25"),
        ("5", "0.75"),
    ]
    assert [r["step"] for r in rows if r["metric"] == "loss"] == ["1", "2", "3", "4", "5"]
    kept, last = (load_file(stage / name / "model.safetensors") for name in ("finished", "last"))
    name = "model.vision.encoder.branches.0.blocks.0.attn.qkv.weight"
    assert torch.equal(kept[name], weights[1][name])
    assert torch.equal(last[name], weights[2][name])
    assert not torch.equal(kept[name], last[name])


def test_a_stage_can_keep_its_last_weights_and_a_loss_that_is_no_number_is_not_the_best(
    tmp_path, monkeypatch
):
    losses, weights = iter([float("nan"), 0.5, 0.75]), []
    name = "model.vision.encoder.branches.0.blocks.0.attn.qkv.weight"

    def measured(self):
        weights.append(self.model.get_parameter(name).detach().clone())
        return {"frames": next(losses)}

    monkeypatch.setattr(StageTrainer, "_validation_means", measured)
    train("reader_smoke", [*VALIDATED, f"output={tmp_path}", "stages.look.keep=last"])
    stage = tmp_path / "reader_smoke/1_look"
    assert not (stage / "last").exists()
    best, kept = (load_file(stage / folder / "model.safetensors")[name] for folder in ("best", "finished"))
    assert torch.equal(best, weights[1])
    assert torch.equal(kept, weights[2])
    assert not torch.equal(best, kept)


def test_a_validation_loss_is_the_mean_over_all_samples_and_moves_no_weight(tmp_path):
    trainer = stage_trainer(
        tmp_path,
        "stages.answer.validation=[{kind: drawn, count: 5, seed: 9, sides: [160, 256], text: [12, 16]}]",
        "stages.answer.batch=2",
        "stages.answer.losses={language: 2.0, frames: 0.5}",
        "stages.answer.trainer={report_to: none}",
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.evaluate()
    batch = trainer.task.collate([trainer.eval_dataset[i].sample for i in range(5)])
    with torch.no_grad():
        whole = trainer.model.eval()(**batch)
    assert whole.keys() == {"language", "frames", "accuracy"}
    for name in ("language", "frames"):
        assert metrics[f"eval_loss_{name}"] == pytest.approx(float(whole[name]), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx(float(whole["accuracy"]), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(
        float(2.0 * whole["language"] + 0.5 * whole["frames"]), rel=1e-4
    )
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    assert trainer.state.best_metric == metrics["eval_loss"]


def test_metrics_go_on_where_the_checkpoint_was(tmp_path, monkeypatch):
    through = train("reader_smoke", [*VALIDATED, f"output={tmp_path}/through"])
    killed_after(3, monkeypatch, "reader_smoke", [*VALIDATED, f"output={tmp_path}/killed"])
    killed = tmp_path / "killed/reader_smoke/1_look"
    assert {row["step"] for row in read_metrics(killed)} == {"1", "2", "3"}
    resumed = train("reader_smoke", [*VALIDATED, f"output={tmp_path}/killed"])
    assert equal_weights(through, resumed)
    told, again = (
        [row for row in read_metrics(tmp_path / name / "reader_smoke/1_look") if "loss" in row["metric"]]
        for name in ("through", "killed")
    )
    assert told == again


def test_epochs_are_as_long_as_the_sources_together(tmp_path):
    task_of = "stages.answer.data=[{kind: drawn, count: 5}, {kind: drawn, count: 4, seed: 1}]"
    overrides = ["stages.answer.steps=null", "stages.answer.epochs=1.5", task_of, "stages.answer.batch=2"]
    trainer = stage_trainer(tmp_path, *overrides, "stages.answer.accumulate=2")
    assert trainer.args.max_steps == 4  # 13.5 samples, 4 a step
    assert len(trainer.train_dataset) == 16


def test_no_sample_comes_again_before_all_have_come(tmp_path):
    overrides = ["stages.answer.steps=null", "stages.answer.epochs=5", "workers=0"]
    trainer = stage_trainer(tmp_path, *overrides, "stages.answer.data=[{kind: drawn, count: 10}]")
    places = trainer.train_dataset.places()
    order = list(trainer.get_train_dataloader().batch_sampler)
    drawn = [places[i] for batch in order for i in batch]
    assert len(drawn) >= 50
    for start in range(0, 50, 10):
        assert len(set(drawn[start : start + 10])) == 10
    assert drawn[:10] != drawn[10:20]


def test_metrics_tell_epochs_of_the_data(tmp_path):
    overrides = [f"output={tmp_path}", "bf16=false", "workers=0", "log_steps=1", "stages.answer.steps=1"]
    drawn = "stages.look.data=[{kind: drawn, count: 4, sides: [96, 96], reads: 2}]"
    train("reader_smoke", [*overrides, drawn, "stages.look.steps=6", "stages.look.batch=2"])
    rows = [row for row in read_metrics(tmp_path / "reader_smoke/1_look") if row["metric"] == "loss"]
    assert [(row["step"], float(row["epoch"])) for row in rows] == [(str(i), i / 2) for i in range(1, 7)]


def test_a_row_of_metrics_that_was_cut_short_is_left_out(tmp_path, monkeypatch):
    killed_after(3, monkeypatch, "reader_smoke", [*VALIDATED, f"output={tmp_path}"])
    table = tmp_path / "reader_smoke/1_look/metrics.csv"
    with table.open("a") as file:
        file.write("2")
    train("reader_smoke", [*VALIDATED, f"output={tmp_path}"])
    assert all(row["value"] for row in read_metrics(table.parent))


def test_a_record_that_was_cut_short_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "reader_smoke/1_look"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text("")
    with pytest.raises(ValueError, match=r"recipe\.json is not JSON"):
        train("reader_smoke", [f"output={tmp_path}"])


def test_a_run_may_lie_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(
        "reader_smoke", ["output=~/runs", "stages.look.data=[{kind: drawn, fonts: ~/fonts}]"]
    )
    assert recipe.output == tmp_path / "runs"
    assert recipe.stages[0].data[0].fonts == tmp_path / "fonts"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stages.answer.schedule.name=cosin", "stages.answer: TrainingArguments: .*cosin"),
        ("stages.answer.optimiser.name=adamm", "stages.answer: TrainingArguments: .*adamm"),
        ("stages.answer.trainer={gradient_checkpoint: true}", "stages.answer: TrainingArguments"),
        ("stages.answer.train=[visio]", "no part of the model is called 'visio'"),
        ("stages.answer.optimiser.part_lrs={visio: 1}", "no part of the model that learns is called 'visio'"),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_told_before_the_first(
    tmp_path, monkeypatch, override, complaint
):
    monkeypatch.setattr(StageTrainer, "__init__", lambda *_, **__: pytest.fail("a stage has begun"))
    with pytest.raises(ValueError, match=complaint):
        train("reader_smoke", [f"output={tmp_path}", "bf16=false", override])
    with pytest.raises(ValueError, match=complaint):
        dry_run("reader_smoke", [override])


@pytest.mark.parametrize("field", ["data", "validation"])
def test_data_that_hold_nothing_are_named(tmp_path, field):
    (tmp_path / "none.json").write_text("[]")
    entry = f"{{kind: conversations, path: {tmp_path}/none.json}}"
    complaint = rf"stages\.look\.{field}: .*none\.json holds no sample"
    with pytest.raises(ValueError, match=complaint):
        train("reader_smoke", [f"output={tmp_path}", "bf16=false", f"stages.look.{field}=[{entry}]"])


def test_every_stage_draws_and_shuffles_by_a_seed_of_its_own(tmp_path, monkeypatch):
    seeds = []

    def tell(self, module, task, recipe, source, folder, *, seed):
        seeds.append((source.seed, seed))
        raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "__init__", tell)
    for number, stage in enumerate(("1_look", "2_answer")):
        with pytest.raises(KeyboardInterrupt):
            train("reader_smoke", [f"output={tmp_path}", "seed=7"])
        finished = tmp_path / f"reader_smoke/{stage}/finished"
        assert seeds[number] == (7 + number, 7 + number)
        finished.mkdir(parents=True)
        monkeypatch.setattr("stepwell.train.run.load_model", lambda module, weights: None)


def test_every_process_has_samples_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    recipe = load_recipe("reader_smoke")
    task = ReaderTask(recipe, recipe.stages[1])
    assert len(mixture(task, seed=0)) == 3 * 2 * 2


SCRIPT = """
import sys
import torch
from stepwell.train.run import train
from stepwell.train.stage_trainer import StageTrainer

kill, *overrides = sys.argv[1:]
whole = StageTrainer.training_step
left = iter(range(int(kill)))


def until_killed(self, *args, **kwargs):
    if next(left, None) is None:
        raise SystemExit(5)
    return whole(self, *args, **kwargs)


StageTrainer.training_step = until_killed
train("reader_smoke", overrides)
"""


def test_of_the_group_of_processes_nothing_is_left(tmp_path):
    """Also where only the garbage collector frees who holds it, and where there is none."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    holder = [torch.distributed.group.WORLD]
    holder.append(holder)
    group = weakref.ref(holder[0])
    del holder
    for _ in range(2):
        leave_group()
        assert not torch.distributed.is_initialized()
    assert group() is None


def in_two_processes(folder, *overrides, kill=99):
    run_in_two(SCRIPT, folder, str(kill), *overrides, fails=kill != 99)


DISTRIBUTED = ["bf16=false", "stages.look.steps=2", "stages.answer.steps=2"]


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    sgd = [f"stages.{name}.optimiser={{name: sgd, lr: 0.1}}" for name in ("look", "answer")]
    in_two_processes(
        tmp_path, *DISTRIBUTED, *sgd, f"output={tmp_path}/two", "stages.look.batch=1", "stages.answer.batch=1"
    )
    one = train("reader_smoke", [*DISTRIBUTED, *sgd, f"output={tmp_path}/one", "save_dtype=float32"])
    runs = [one.parent, tmp_path / "two/reader_smoke"]
    for stage in ("1_look", "2_answer"):
        ours, theirs = (load_file(run / stage / "finished/model.safetensors") for run in runs)
        for name, weights in ours.items():
            torch.testing.assert_close(theirs[name], weights, rtol=1e-3, atol=1e-5, msg=f"{stage} {name}")


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(tmp_path):
    settings = [*DISTRIBUTED, "stages.look.steps=3", "save_steps=1", "workers=1"]
    in_two_processes(tmp_path, *settings, f"output={tmp_path}/through")
    in_two_processes(tmp_path, *settings, f"output={tmp_path}/killed", kill=2)
    assert (tmp_path / "killed/reader_smoke/1_look/checkpoint-2/whole").is_file()
    in_two_processes(tmp_path, *settings, f"output={tmp_path}/killed")
    assert equal_weights(*(tmp_path / name / "reader_smoke/model" for name in ("through", "killed")))


@pytest.mark.slow
def test_a_run_starts_from_a_model_by_the_command_line(finished, tmp_path):
    """In a process that has imported nothing before."""
    _, folder = finished
    recipe = load_recipe("reader_smoke").model_dump(mode="json", exclude_unset=True)
    recipe |= {"model": {"start": str(folder)}, "bf16": False, "output": str(tmp_path)}
    recipe["stages"] = [{**recipe["stages"][1], "steps": 1}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "stepwell", "train", str(tmp_path / "mine.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == f"trained: {tmp_path}/reader_smoke/model"
    start, end = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "reader_smoke/model"))
    assert start.keys() == end.keys()
    assert max((start[name].float() - end[name].float()).abs().max() for name in start) < 0.02


def test_the_shipped_model_can_be_named_as_a_start():
    recipe = load_recipe("reader_smoke")
    recipe = recipe.model_copy(update={"model": ReaderModel(start="reader_tiny")})
    stage = recipe.stages[1].model_copy(update={"vision": {}})
    task = ReaderTask(recipe, stage)
    assert task.origin == SHIPPED
    assert task.config.text_config.num_hidden_layers > 3


@pytest.mark.parametrize(
    ("start", "complaint"),
    [
        (
            "reader_tinny",
            "unknown model reader_tinny: no such folder, not the shipped reader_tiny or boards_tiny, and hub",
        ),
        ("./nowhere", "unknown model ./nowhere"),
    ],
)
def test_a_start_that_there_is_not_is_refused_at_once(start, complaint):
    recipe = load_recipe("reader_smoke")
    recipe = recipe.model_copy(update={"model": ReaderModel(start=start)})
    with pytest.raises(ValueError, match=complaint):
        ReaderTask(recipe, recipe.stages[0])


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
    batch = trainer.task.collate([trainer.train_dataset[0].sample])
    losses = trainer.model(**batch)
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
