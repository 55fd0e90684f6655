"""Every published recipe of an assistant, two steps a stage, from small folders of encoders and a language
model in place of the names: what starts from them, what learns, and what does not move.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import set_seed

import stepwell
from stepwell.models.vision import settings_json
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.groups import idle_parameters, part_of
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train
from stepwell.train.shipped import recipe_names
from stepwell.train.tasks import find_task

pytestmark = pytest.mark.slow

DIM, DEPTH, GRID = 32, 2, 4
VIT = {"dim": DIM, "depth": DEPTH, "num_heads": 2, "position_grid": [GRID, GRID]}
CONVNEXT = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
MARKS = [
    "<s>",
    "</s>",
    *(f"<|{name}|>" for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")),
]
SYSTEMS = ("piip_llava", "uhd_v", "inf_", "llava_", "pyramid_shared")
CHATS = [name for name in recipe_names() if name.startswith(SYSTEMS) and "upsampler" not in name]


def clip(folder: Path, patch: int) -> dict[str, torch.Tensor]:
    config = transformers.CLIPVisionConfig(
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=GRID * patch,
        patch_size=patch,
    )
    model = transformers.CLIPVisionModel(config)
    model.save_pretrained(folder)
    return model.state_dict()


def convnext(folder: Path) -> dict[str, torch.Tensor]:
    model = timm.create_model("convnext_tiny", pretrained=False, num_classes=0, **CONVNEXT)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "convnext_tiny", "num_classes": 0}))
    return model.state_dict()


def language(folder: Path, family: str) -> dict[str, torch.Tensor]:
    tokenizer = build_reader_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    config = transformers.AutoConfig.for_model(family, **sizes, **ids, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.state_dict()


def small(vision: Any) -> dict[str, Any]:
    """Settings of a vision system with small networks on small views."""
    fields = settings_json(vision)
    kind = fields["kind"]
    if kind == "piip":
        for branch, size in zip(fields["branches"], (64, 128), strict=True):
            is_convnext = "convnext" in branch["encoder"]
            branch |= {"size": size, "arguments": CONVNEXT if is_convnext else VIT}
            branch["interactions"] = [[0, 3], [4, 6]] if is_convnext else [[0, 0], [1, 1]]
        fields["interaction"] |= {"num_heads": 4, "ratio": 1.0}
        fields["projector"] |= {"num_groups": 8}
    elif kind == "llava_hr":
        fields |= {
            "size": 128,
            "fast_least": 56,
            "adapters": 1,
            "fast_arguments": VIT,
            "slow_arguments": CONVNEXT,
        }
    else:
        fields |= {"arguments": VIT}
        if kind == "pyramid_shared":
            fields |= {"sizes": [56, 112], "projector": {"num_groups": 8, "grid": [4, 4]}}
        else:
            fields |= {"size": 56}
        if kind == "inf":
            fields["resolutions"] = [size // 6 for size in fields["resolutions"]]
    return fields


def fitted(changes: dict[str, Any]) -> dict[str, Any]:
    """A stage's changes of the geometry, in the small sizes."""
    return {**changes, "sizes": [64]} if "sizes" in changes else changes


@pytest.fixture
def recipe(request: Any, tmp_path: Path) -> tuple[Any, Path, dict[str, dict[str, torch.Tensor]]]:
    """The published recipe, the small one's file, and the tensors that each part starts from."""
    published = load_recipe(request.param)
    torch.manual_seed(1)
    starts, parts = {}, {}
    for part, source in published.model.parts.items():
        if part == "vision.upsampler":
            continue  # of a training of ours
        folder = parts[part] = tmp_path / part
        if part == "language":
            starts[part] = language(folder, "qwen2" if request.param == "llava_hr" else "llama")
        elif "convnext" in source:
            starts[part] = convnext(folder)
        else:
            starts[part] = clip(folder, 16 if "14to16" in source or "patch16" in source else 14)
    Image.effect_noise((90, 60), 80).convert("RGB").save(tmp_path / "image.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A CAT"}]
    words = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A DOG"}]
    entries = [{"image": "image.png", "conversations": turns}, {"conversations": words}]
    (tmp_path / "align.json").write_text(json.dumps(entries[:1]))
    (tmp_path / "tune.json").write_text(json.dumps(entries))
    fields = published.model_dump(mode="json", exclude_unset=True)
    fields |= {"output": str(tmp_path / "runs"), "name": "small", "workers": 0, "bf16": False}
    fields["model"] |= {
        "vision": small(published.model.vision),
        "parts": {k: str(v) for k, v in parts.items()},
    }
    fields["model"].pop("tokenizer", None)
    for stage in fields["stages"]:
        stage |= {"steps": 2, "batch": 2, "accumulate": 1, "trainer": {"gradient_checkpointing": True}}
        stage |= {"max_length": 4096, "schedule": {"name": "constant", "warmup_steps": 0}}
        stage["vision"] = fitted(stage.get("vision", {}))
        del stage["epochs"]
        for data in stage["data"]:
            data |= {"path": str(tmp_path / f"{stage['name']}.json"), "images": str(tmp_path)}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(fields))
    return published, tmp_path / "small.yaml", starts


@pytest.mark.parametrize("recipe", CHATS, indirect=True)
def test_what_is_loaded_learns_where_it_should_and_nowhere_else(recipe: Any) -> None:
    published, file, starts = recipe
    settings = load_recipe(file)
    task = find_task("chat")(settings, settings.stages[0])
    set_seed(settings.seed)
    model = task.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part, theirs in starts.items():
        ours = [tensor for name, tensor in before.items() if part_of(name, model.parts).startswith(part)]
        matrices = [tensor for tensor in theirs.values() if tensor.ndim == 2 and len(tensor) > 16]
        loaded = [any(torch.equal(tensor, own) for own in ours) for tensor in matrices]
        assert sum(loaded) >= len(matrices) / 2, part  # queries, keys and values are one matrix here
    idle = {id(parameter) for parameter in idle_parameters(model)}
    learnable = {name for name, parameter in model.named_parameters() if id(parameter) not in idle}
    assistant = stepwell.load(train(file))
    assert isinstance(assistant.ask(file.parent / "image.png", "What?", max_new_tokens=2), str)
    for i, stage in enumerate(published.stages, start=1):
        weights = file.parent / "runs" / "small" / f"{i}_{stage.name}" / "finished" / "model.safetensors"
        after = load_file(weights)
        assert any(part.startswith("projector") for part in stage.train)
        for name in learnable & after.keys():
            part = part_of(name, model.parts)
            if not any(part == learned or part.startswith(f"{learned}.") for learned in stage.train):
                assert torch.equal(before[name], after[name]), f"{name} moved in {stage.name}"
        for learned in stage.train:
            inside = [n for n in after if (part_of(n, model.parts) + ".").startswith(f"{learned}.")]
            moved = [name for name in inside if not torch.equal(before[name], after[name])]
            assert moved, f"{learned} did not move in {stage.name}"
        before = {**before, **after}
