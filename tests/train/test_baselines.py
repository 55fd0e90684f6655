"""The baselines' recipes in small: what learns in which stage, and at which sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import stepwell
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train

SMALL = {
    "llava_hr": {
        "fast": "vit_nano",
        "slow": "convnext_nano",
        "size": 128,
        "fast_least": 32,
        "slow_arguments": {"strides": [4, 2, 2, 2]},
    },
    "pyramid_shared": {"encoder": "vit_nano", "sizes": [32, 64], "projector": {"num_groups": 8}},
}
SIZES = {"llava_hr": {"sizes": [64]}, "pyramid_shared": {"sizes": [16, 32]}}


@pytest.fixture
def trained(request, tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after both stages of a shipped recipe, its networks and data exchanged for small ones."""
    kind = request.param
    recipe = load_recipe(kind)
    Image.effect_noise((90, 60), 80).convert("RGB").save(tmp_path / "image.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A CAT"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "image.png", "conversations": turns}]))
    build_reader_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    stages = [
        {
            "name": stage.name,
            "train": list(stage.train),
            "steps": 3,
            "batch": 1,
            "vision": stage.vision | (SIZES[kind] if stage.vision else {}),
            "data": [{"kind": "conversations", "path": str(tmp_path / "data.json")}],
            "trainer": {"gradient_checkpointing": True},
            "optimiser": {"lr": 1e-2},
            "schedule": {"name": "constant", "warmup_steps": 0},
        }
        for stage in recipe.stages
    ]
    small = {
        "name": kind,
        "output": str(tmp_path / "runs"),
        "workers": 0,
        "bf16": False,
        "model": {
            "vision": {"kind": kind, **SMALL[kind]},
            "text": {"model_type": "llama", **text},
            "tokenizer": str(tmp_path / "tokenizer"),
            "template": "chatml_direct",
        },
        "stages": stages,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    assistant = stepwell.load(train(tmp_path / "small.yaml"))
    assert isinstance(assistant.ask(Image.new("RGB", (50, 80)), "What?", max_new_tokens=2), str)
    folder = tmp_path / "runs" / kind
    return {
        stage.name: load_file(folder / f"{i}_{stage.name}" / "finished" / "model.safetensors")
        for i, stage in enumerate(recipe.stages, start=1)
    }


def changed(trained, prefix):
    before, after = trained["align"], trained["tune"]
    return {name for name in after if name.startswith(prefix) and not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("trained", ["llava_hr"], indirect=True)
def test_adapters_of_llava_hr_add_nothing_before_the_second_stage(trained):
    ends = [name for name in trained["align"] if re.search(r"\.adapters\..*(local|slow)\.2\.", name)]
    assert len(ends) == 3 * 2 * 2
    assert all(not trained["align"][name].any() for name in ends)
    assert all(trained["tune"][name].any() for name in ends)
    for part in ("branches.0.", "branches.1.", "adapters.0.gate", "merge.", "projector."):
        assert changed(trained, f"model.vision.{part}"), part


@pytest.mark.parametrize("trained", ["pyramid_shared"], indirect=True)
def test_the_shared_encoder_learns_in_the_second_stage(trained):
    assert changed(trained, "model.vision.encoder.branches.0.blocks.0.")
    assert changed(trained, "model.vision.projector.")
