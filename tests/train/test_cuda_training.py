"""Training on a GPU: the recipe that runs everywhere, its batches, its steps, and its way back."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import equal_weights, killed_after, read_metrics
from test_steps import ONE_STEP, after_a_step, talk, tensors, trainer_of
from torch import nn

import stepwell
from stepwell.train.run import train

pytestmark = pytest.mark.cuda
__all__ = ["talk"]  # a fixture
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_smoke_recipe_trains_in_bf16_and_its_model_answers(tmp_path, cuda):
    folder = train("reader_smoke", [f"output={tmp_path}", "bf16=true", "workers=2"])
    for stage in ("1_look", "2_answer"):
        losses = [
            float(row["value"]) for row in read_metrics(folder.parent / stage) if row["metric"] == "loss"
        ]
        assert len(losses) == 2
        assert all(0 < loss < 100 for loss in losses)
        finished = load_file(folder.parent / stage / "finished/model.safetensors")
        assert {tensor.dtype for tensor in finished.values() if tensor.is_floating_point()} == {torch.float32}
    model = stepwell.load(folder, device=cuda)
    assert model.model.device == cuda
    assert isinstance(model.ask(EXAMPLES / "receipt.jpg", "What?", max_new_tokens=3), str)


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_the_smoke_recipe_trains_from_the_command_line(bf16, tmp_path, cuda):
    command = [sys.executable, "-m", "stepwell", "train", "reader_smoke"]
    for override in (f"output={tmp_path}", f"bf16={bf16}"):
        command += ["--set", override]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == f"trained: {tmp_path}/reader_smoke/model"


def test_every_tensor_of_a_batch_and_of_the_module_is_on_the_gpu(tmp_path, cuda):
    trainer = trainer_of(tmp_path, "bf16=false")
    batch = trainer.task.collate([trainer.train_dataset[i].sample for i in range(2)])
    found = tensors(trainer._prepare_inputs(batch))
    assert len(found) > 12
    assert {tensor.device for tensor in found} == {cuda}
    assert {parameter.device for parameter in trainer.model.parameters()} == {cuda}


@pytest.mark.parametrize("stage", [0, 1])
def test_losses_and_gradients_of_a_stage_are_those_of_a_cpu(stage, tmp_path, cuda):
    trainer = trainer_of(tmp_path, "bf16=false", stage=stage)
    batch = trainer.task.collate([trainer.train_dataset[i].sample for i in range(2)])
    results = []
    for module in (copy.deepcopy(trainer.model).cpu(), trainer.model):
        inputs = batch if not results else trainer._prepare_inputs(batch)
        losses = module.eval()(**inputs)
        sum(losses.values()).backward()
        found = {n: p.grad.cpu() for n, p in module.named_parameters() if p.grad is not None}
        results.append(({name: float(loss.detach()) for name, loss in losses.items()}, found))
    (expected, slopes), (ours, found) = results
    assert ours == pytest.approx(expected, rel=1e-4)
    assert len(slopes) > 20
    for name, slope in slopes.items():
        assert (found[name] - slope).norm() <= 1e-2 * slope.norm() + 1e-6, name


def test_accumulated_batches_are_the_step_of_one_large_batch_on_a_gpu(tmp_path, talk, cuda):
    data = ["stages.answer.losses={language: 1.0}", f"stages.answer.data={talk('talk')}"]
    split = ["stages.answer.batch=1", "stages.answer.accumulate=4"]
    one = after_a_step(trainer_of(tmp_path / "one", *ONE_STEP, *data, "stages.answer.batch=4"))
    four = after_a_step(trainer_of(tmp_path / "four", *ONE_STEP, *data, *split))
    start = {
        n: p.to(cuda) for n, p in trainer_of(tmp_path / "start", *ONE_STEP, *data).model.named_parameters()
    }
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
    for name, weights in one.items():
        torch.testing.assert_close(four[name], weights, rtol=1e-3, atol=1e-5, msg=name)


def test_losses_of_several_kinds_weigh_on_a_gpu_what_they_count(tmp_path, cuda):
    split = ["stages.answer.batch=1", "stages.answer.accumulate=3"]
    one = after_a_step(trainer_of(tmp_path / "one", *ONE_STEP, "stages.answer.batch=3"))
    three = after_a_step(trainer_of(tmp_path / "three", *ONE_STEP, *split))
    for name, weights in one.items():
        torch.testing.assert_close(three[name], weights, rtol=5e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("parts", ["[projector]", "[language]"])
def test_a_batch_without_an_image_is_trained_on_a_gpu(tmp_path, talk, parts, cuda):
    data = [f"stages.answer.data={talk('text')}", f"stages.answer.train={parts}", "stages.answer.batch=1"]
    after = after_a_step(trainer_of(tmp_path / "run", *ONE_STEP, *data))
    assert all(weights.isfinite().all() for weights in after.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_holds_on_a_gpu_in_a_stage_without_a_language_loss(tmp_path, bf16, cuda):
    trainer = trainer_of(tmp_path, f"bf16={bf16}", "stages.look.steps=1", "workers=0", stage=0)
    kinds = set()
    for name, module in trainer.model.named_modules():
        if "vision" in name and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: kinds.add((out.dtype, out.device)))
    trainer.train()
    assert kinds == {(torch.bfloat16 if bf16 else torch.float32, cuda)}


# Sums on a GPU are not added in the same order twice, so plain steps and not Adam's, which would round up.
STEPS = ["save_steps=1", "stages.look.steps=3", "stages.answer.steps=2"]
STEPS += [f"stages.{name}.optimiser={{name: sgd, lr: 0.1}}" for name in ("look", "answer")]


@pytest.mark.parametrize("bf16", ["false", "true"])
@pytest.mark.parametrize("killed_at", [2, 4])
def test_an_interrupted_training_ends_on_a_gpu_as_if_it_had_not_been(
    killed_at, bf16, tmp_path, monkeypatch, cuda
):
    settings = [*STEPS, f"bf16={bf16}", "save_dtype=float32"]
    through = train("reader_smoke", [*settings, f"output={tmp_path}/through"])
    killed_after(killed_at, monkeypatch, "reader_smoke", [*settings, f"output={tmp_path}/killed"])
    resumed = train("reader_smoke", [*settings, f"output={tmp_path}/killed"])
    last = [row for row in read_metrics(through.parent / "2_answer") if row["metric"] == "loss"]
    again = [row for row in read_metrics(resumed.parent / "2_answer") if row["metric"] == "loss"]
    assert [row["step"] for row in again] == [row["step"] for row in last] == ["1", "2"]
    ours, expected = (load_file(folder / "model.safetensors") for folder in (resumed, through))
    tolerance = 1e-2 if bf16 == "true" else 1e-3
    for name, weights in expected.items():
        torch.testing.assert_close(ours[name], weights, rtol=tolerance, atol=tolerance / 10, msg=name)
    assert not equal_weights(through.parent / "1_look/finished", through.parent / "2_answer/finished")


def test_a_validation_loss_on_a_gpu_is_a_number_and_the_best_is_kept(tmp_path, cuda):
    folder = train(
        "reader_smoke",
        [
            f"output={tmp_path}",
            "bf16=true",
            "stages.look.validation=[{kind: drawn, count: 3, seed: 9, sides: [128, 128], text: [12, 16]}]",
            "stages.look.validate_steps=1",
        ],
    )
    stage = folder.parent / "1_look"
    losses = [float(row["value"]) for row in read_metrics(stage) if row["metric"] == "eval_loss"]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert (stage / "best/model.safetensors").is_file()
