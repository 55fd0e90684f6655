"""Training whose weights lie in parts in several processes: FSDP2 through accelerate.

On CPUs accelerate would train whole copies (DDP) instead. The script here has it take them for devices that
it shards over, so that two processes of a CPU go the way that GPUs go.
"""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from two_processes import TWO, run_in_two

from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train
from stepwell.train.sharding import sharding_units
from stepwell.train.stage_trainer import StageTrainer
from stepwell.train.tasks import find_task

SCRIPT = """
import os
import sys
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from stepwell.train.run import train
from stepwell.train.stage_trainer import StageTrainer

kill, *overrides = sys.argv[1:]
begin, step = AcceleratorState.__init__, StageTrainer.training_step
left = iter(range(int(kill)))


def sharding_cpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if kwargs.get("fsdp_plugin") is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = kwargs["fsdp_plugin"]


def until_killed(self, *args, **kwargs):
    assert all(isinstance(p, DTensor) for p in self.model.parameters())
    if next(left, None) is None:
        raise SystemExit(5)
    return step(self, *args, **kwargs)


AcceleratorState.__init__, StageTrainer.training_step = sharding_cpus, until_killed
train("reader_smoke", overrides)
os._exit(0)  # caches of DTensor keep the group, and with it threads of gloo that could abort the process
"""
STAGES = {"look": "{frames: 1.0}", "answer": "{language: 1.0, frames: 0.5}"}  # pointers look into layers
SETTINGS = ["bf16=false", "save_dtype=float32", "workers=0"]
SETTINGS += [f"stages.{name}.losses={losses}" for name, losses in STAGES.items()]
SHARDED = [f"stages.{name}.trainer={{fsdp: true, fsdp_config: {{}}}}" for name in STAGES]


def in_two_processes(folder, *overrides, steps=99, fails=False):
    """steps: a further one is not begun."""
    run_in_two(SCRIPT, folder, str(steps), *SETTINGS, *SHARDED, *overrides, fails=fails)


@pytest.mark.slow
def test_weights_in_two_parts_train_to_those_of_one_process(tmp_path):
    sgd = [f"stages.{name}.optimiser={{name: sgd, lr: 0.1}}" for name in STAGES]
    halves = [f"stages.{name}.batch=1" for name in STAGES]
    in_two_processes(tmp_path, *sgd, *halves, f"output={tmp_path}/two")
    one = train("reader_smoke", [*SETTINGS, *sgd, f"output={tmp_path}/one"])
    two = tmp_path / "two/reader_smoke/model"
    ours, theirs = (load_file(model / "model.safetensors") for model in (one, two))
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        torch.testing.assert_close(theirs[name], weights, rtol=1e-3, atol=1e-5, msg=name)
    StepwellForConditionalGeneration.from_pretrained(two)


@pytest.mark.slow
def test_weights_in_two_parts_go_on_where_they_were(tmp_path):
    settings = ["stages.answer.steps=3", "save_steps=1"]
    in_two_processes(tmp_path, *settings, f"output={tmp_path}/through")
    in_two_processes(tmp_path, *settings, f"output={tmp_path}/killed", steps=4, fails=True)
    assert (tmp_path / "killed/reader_smoke/2_answer/checkpoint-2/whole").is_file()
    in_two_processes(tmp_path, *settings, f"output={tmp_path}/killed", steps=1)  # the third of `answer`
    through, killed = (
        load_file(tmp_path / name / "reader_smoke/model/model.safetensors") for name in ("through", "killed")
    )
    for name, weights in through.items():
        torch.testing.assert_close(killed[name], weights, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_what_would_be_whole_copies_is_refused(tmp_path):
    command = [*TWO, "-m", "stepwell", "train", "reader_smoke"]
    for override in (*SETTINGS, *SHARDED, f"output={tmp_path}"):
        command += ["--set", override]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode != 0
    assert "stages.look.trainer.fsdp: weights are sharded over GPUs, one a process; here" in result.stderr


def test_pointers_are_refused_where_weights_are_in_parts():
    settings = load_recipe("reader_smoke", SHARDED)
    with pytest.raises(ValueError, match=r"stages\.answer: the loss pointer looks into layers"):
        find_task(settings.task)(settings, settings.stages[1])


def test_only_what_is_called_once_a_step_is_gathered_for_itself():
    settings = load_recipe("reader_smoke")
    module = find_task(settings.task)(settings, settings.stages[1]).build()
    assert sharding_units(module) == ["LlamaDecoderLayer"]
    assert sharding_units(module.model.vision) == []


@pytest.mark.parametrize("field", ["validation", "average"])
def test_what_wants_whole_weights_is_refused_where_they_are_in_parts(field, monkeypatch):
    settings = load_recipe("reader_smoke", SHARDED)
    stage = settings.stages[0].model_copy(update={field: ("something",)})
    trainer = SimpleNamespace(task=SimpleNamespace(stage=stage))
    with pytest.raises(ValueError, match=rf"stages\.look\.{field} wants whole weights in every process"):
        StageTrainer._shard(trainer, torch.nn.Linear(1, 1))


def test_layers_of_language_models_are_found_whatever_they_are_called():
    gpt = "model.text={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 4096}"
    plain = ["model.start_looking=false", "stages.answer.losses={language: 1.0}"]
    settings = load_recipe("reader_smoke", [gpt, *plain])
    assert sharding_units(find_task(settings.task)(settings, settings.stages[1]).build()) == ["GPT2Block"]
