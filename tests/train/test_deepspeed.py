"""Optimiser and gradients in two processes by DeepSpeed, where it is installed: pip install deepspeed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from two_processes import run_in_two

from stepwell.train.run import train

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
from stepwell.train.run import train
from stepwell.train.stage_trainer import StageTrainer

kill, *overrides = sys.argv[1:]
step = StageTrainer.training_step
left = iter(range(int(kill)))


def until_killed(self, *args, **kwargs):
    assert self.is_deepspeed_enabled
    if next(left, None) is None:
        raise SystemExit(5)
    return step(self, *args, **kwargs)


StageTrainer.training_step = until_killed
train("reader_smoke", overrides)
"""
STAGES = {"look": "{frames: 1.0}", "answer": "{language: 1.0, frames: 0.5}"}
SETTINGS = ["bf16=false", "save_dtype=float32", "workers=0"]
SETTINGS += [f"stages.{name}.losses={losses}" for name, losses in STAGES.items()]


@pytest.fixture
def two(tmp_path, monkeypatch):
    """two(*overrides, steps=, fails=) trains in two processes; a further step than `steps` is not begun."""
    names = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    config |= dict.fromkeys((*names, "gradient_clipping"), "auto")
    (tmp_path / "zero2.json").write_text(json.dumps(config))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ours = [f"stages.{name}.trainer={{deepspeed: {tmp_path}/zero2.json}}" for name in STAGES]

    def two(*overrides, steps=99, fails=False):
        run_in_two(SCRIPT, tmp_path, str(steps), *SETTINGS, *ours, *overrides, fails=fails)

    return two


def weights_of(folder):
    return load_file(folder / "reader_smoke/model/model.safetensors")


def test_two_processes_train_to_the_weights_of_one(two, tmp_path):
    sgd = [f"stages.{name}.optimiser={{name: sgd, lr: 0.1, weight_decay: 0.0}}" for name in STAGES]
    halves = [f"stages.{name}.batch=1" for name in STAGES]
    two(*sgd, *halves, f"output={tmp_path}/two")
    train("reader_smoke", [*SETTINGS, *sgd, f"output={tmp_path}/one"])
    one, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == other.keys()
    for name, weights in one.items():
        torch.testing.assert_close(other[name], weights, rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_go_on_where_they_were(two, tmp_path):
    settings = ["stages.answer.steps=3", "save_steps=1"]
    two(*settings, f"output={tmp_path}/through")
    two(*settings, f"output={tmp_path}/killed", steps=4, fails=True)
    two(*settings, f"output={tmp_path}/killed", steps=1)  # the third of `answer`
    through, killed = weights_of(tmp_path / "through"), weights_of(tmp_path / "killed")
    for name, weights in through.items():
        torch.testing.assert_close(killed[name], weights, rtol=0, atol=0, msg=name)
