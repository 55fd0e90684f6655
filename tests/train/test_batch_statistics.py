"""Norms over batches: whose statistics follow the batches of a stage."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stepwell.train.run import train

BRANCH = (
    "{encoder: resnet_nano, size: 256, interactions: [[0, 2]], arguments: {dims: [8, 16, 32], stem_dim: 8}}"
)
SHORT = ["bf16=false", "workers=0", "stages.look.steps=1", "stages.answer.steps=1", "save_dtype=float32"]
RESNET = [f"model.vision.branches.1={BRANCH}", *SHORT]


def statistics(folder):
    weights = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if "running" in name}


@pytest.mark.slow
def test_statistics_follow_a_stage_that_lets_them_and_stay_in_one_that_does_not(tmp_path):
    kept = "stages.answer.batch_statistics=false"
    run = train("reader_smoke", [*RESNET, kept, f"output={tmp_path}"]).parent
    look, answer = (statistics(run / name / "finished") for name in ("1_look", "2_answer"))
    assert len(look) > 10
    assert any((value != ("var" in name)).any() for name, value in look.items())  # where they begin
    assert all(torch.equal(value, answer[name]) for name, value in look.items())
    model = run / "model"
    for following, name in ((None, "kept"), (True, "following")):
        recipe = {
            "task": "reader",
            "name": name,
            "model": {"start": str(model)},
            "bf16": False,
            "workers": 0,
            "save_dtype": "float32",
            "output": str(tmp_path),
            "stages": [
                {
                    "name": "more",
                    "steps": 1,
                    "batch": 1,
                    "train": ["vision", "language"],
                    "batch_statistics": following,
                    "data": [{"kind": "drawn", "sides": [96, 128], "reads": 2}],
                }
            ],
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        found = statistics(train(path))
        same = all(torch.equal(value, found[key]) for key, value in statistics(model).items())
        assert same == (following is None)
