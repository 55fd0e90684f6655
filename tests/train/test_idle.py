"""What no image reaches does not learn, whichever system it is in; so that processes can train together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from stepwell.fuse.upsample import UpsamplerConfig, build_upsampler
from stepwell.models.systems import vision_settings
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.groups import freeze_all_but

VIT = {"dim": 32, "depth": 3, "num_heads": 2, "patch": 8, "position_grid": [6, 6], "final_norm": True}
REGISTERS = {**VIT, "class_token": True, "registers": 2}
CONVNEXT = {"encoder": "convnext_nano", "size": 64, "arguments": {}}
ONE: dict[str, Any] = {"encoder": "clip_l_14_336", "arguments": VIT, "size": 48}
SLICED = {**ONE, "max_slices": 4, "windows": {"grid": [3, 3]}}
EIGHT = {**SLICED, "kind": "uhd_v2", "levels": [0, 1, 2, 3]}
CROPS = {**ONE, "kind": "inf", "resolutions": [48, 96]}
BRANCH = {"encoder": "vit_nano", "interactions": [[0, 0], [1, 1]], "arguments": VIT}
BRANCHES = [{**BRANCH, "size": 48}, {**BRANCH, "size": 96, "arguments": {**VIT, "dim": 16}}]
TIMM = {"encoder": "timm:vit_tiny_patch16_224", "arguments": {"depth": 3, "img_size": 32}, "size": 32}
RESNET = {"encoder": "timm:resnet18", "arguments": {}, "size": 64}

BEHIND, NORM = "branches.0.blocks.2", "branches.0.norm"
SYSTEMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({"kind": "plain", **ONE}, {BEHIND, NORM}),
    "plain, its embedding": (
        {"kind": "plain", **ONE, "arguments": REGISTERS, "select_layer": 0},
        {"branches.0.blocks", NORM, "branches.0.class_token", "branches.0.registers"},
    ),
    "plain, last state": ({"kind": "plain", **ONE, "select_layer": -1}, {NORM}),
    "plain, ConvNeXt": ({"kind": "plain", **CONVNEXT}, {"branches.0.layers.7"}),
    "plain, timm's blocks": ({"kind": "plain", **TIMM}, {"branches.0.network.blocks.2"}),
    "plain, timm's stages": ({"kind": "plain", **RESNET}, {"branches.0.network.layer4"}),
    "inf": (CROPS, {BEHIND, NORM}),
    "inf, by aspect": ({**CROPS, "resolutions": [48], "max_crops": 2}, {BEHIND, NORM}),
    "uhd_v1": ({"kind": "uhd_v1", **SLICED}, {BEHIND, NORM}),
    "uhd_v2": ({"kind": "uhd_v2", **SLICED}, {BEHIND, NORM}),
    "uhd_v2, 8x": (EIGHT, {BEHIND, NORM, "upsampler.corrections.3"}),
    "uhd_v2, each": (
        {**EIGHT, "levels": [0, 1], "upsampler": {"corrections": "each"}},
        {BEHIND, NORM, "upsampler.corrections.1"},
    ),
    "piip": (
        {"kind": "piip", "branches": BRANCHES, "interaction": {"num_heads": 2}},
        {"encoder.branches.0.norm", "encoder.branches.1.norm"},
    ),
}


@pytest.mark.parametrize(("settings", "idle"), SYSTEMS.values(), ids=SYSTEMS)
def test_all_that_learns_and_nothing_else_has_a_gradient_from_one_step(settings, idle):
    torch.manual_seed(0)
    config = vision_settings(settings)
    vision = config.build(32)
    freeze_all_but(vision, list(config.parts), config.parts)
    learning = {name for name, parameter in vision.named_parameters() if parameter.requires_grad}
    vision.requires_grad_(True)
    layout = vision.geometry.layout((90, 190))
    (tokens,) = vision([torch.randn(3, *size) for size in layout.inputs], [layout])
    tokens.square().sum().backward()
    gradients = {name for name, parameter in vision.named_parameters() if parameter.grad is not None}
    assert learning == gradients
    names = {name for name, _ in vision.named_parameters()} - learning
    assert all(any(name.startswith(f"{part}.") or name == part for part in idle) for name in names)
    assert all(any(name.startswith(f"{part}.") or name == part for name in names) for part in idle)


def test_looking_for_it_changes_neither_weights_nor_draws():
    vision = vision_settings(EIGHT).build(32)
    before, draws = {k: v.clone() for k, v in vision.state_dict().items()}, torch.get_rng_state()
    parameters = list(vision.parameters())
    freeze_all_but(vision, ["branches"], {})
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(one is other for one, other in zip(vision.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vision.state_dict().items())


def test_a_part_of_which_no_image_reaches_anything_is_refused():
    vision = vision_settings(EIGHT).build(32)
    freeze_all_but(vision, ["upsampler.corrections.2"], {})
    with pytest.raises(ValueError, match=r"of the model that an image reaches is called 'branches\.0\.norm'"):
        freeze_all_but(vision, ["projector", "branches.0.norm"], {})


@pytest.mark.parametrize(("levels", "idle"), [(2, set()), (3, {"upsampler.corrections.3"})])
def test_an_up_sampler_that_learns_alone_does_so_without_what_no_level_reads(levels, idle):
    module = nn.ModuleDict({"upsampler": build_upsampler(UpsamplerConfig(), 8, levels)})
    freeze_all_but(module, ["upsampler"], {})
    frozen = {name.rpartition(".linear.")[0] for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == idle


TUNE = """
import sys
from stepwell.train.run import train

train(sys.argv[1])
"""
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}


@pytest.mark.slow
def test_two_processes_tune_the_whole_of_uhd_v2_with_checkpointing(tmp_path):
    for i in range(4):
        Image.effect_noise((90 + 20 * i, 60), 90).convert("RGB").save(tmp_path / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a thing"}]
    (tmp_path / "talk.json").write_text(
        json.dumps([{"image": f"{i}.png", "conversations": turns} for i in range(4)])
    )
    build_reader_tokenizer().save_pretrained(tmp_path / "tokenizer")
    fields: dict[str, Any] = {
        "task": "chat",
        "name": "whole",
        "output": str(tmp_path / "runs"),
        "bf16": False,
        "workers": 0,
        "save_steps": 3,
        "model": {
            "vision": EIGHT,
            "text": {**LLAMA, "num_hidden_layers": 1, "num_attention_heads": 2},
            "tokenizer": str(tmp_path / "tokenizer"),
            "template": "qwen",
        },
    }
    stage = {"batch": 1, "data": [{"kind": "conversations", "path": str(tmp_path / "talk.json")}]}
    tune = {"steps": 3, "train": ["vision", "projector", "language"]}
    fields["stages"] = [
        {"name": "align", "steps": 1, "train": ["projector"], **stage},
        {"name": "tune", **tune, "trainer": {"gradient_checkpointing": True}, **stage},
    ]
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(fields))
    (tmp_path / "tune.py").write_text(TUNE)
    result = subprocess.run(
        [*TWO, str(tmp_path / "tune.py"), str(tmp_path / "whole.yaml")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "runs/whole"
    before, after = (load_file(run / stage / "finished/model.safetensors") for stage in ("1_align", "2_tune"))
    assert before.keys() == after.keys()
    still = {name for name in after if torch.equal(before[name], after[name])}
    idle = [f"model.vision.{part}." for part in (BEHIND, NORM, "upsampler.corrections.3")]
    assert still == {name for name in after if name.startswith(tuple(idle))}
    optimiser = torch.load(run / "2_tune/checkpoint-3/optimizer.pt", weights_only=True)
    assert len(optimiser["state"]) == len(after) - len(still)
