"""Recipes whose parts learn by adapters."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import stepwell
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor
from stepwell.reader.task import ReaderTask
from stepwell.train.dry_run import dry_run
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train
from stepwell.train.tasks import find_task

peft = pytest.importorskip("peft")


@pytest.fixture
def recipe(tmp_path):
    """recipe(lora fields, learning parts) -> a recipe's file that goes on with a small assistant."""
    settings = load_recipe("reader_smoke")
    task = ReaderTask(settings, settings.stages[1])
    torch.manual_seed(0)
    task.start(StepwellForConditionalGeneration, task.config).save_pretrained(tmp_path / "start")
    task.processor.save_pretrained(tmp_path / "start")
    Image.new("RGB", (200, 120), "white").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A B C"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))

    def written(lora, learning=("vision", "projector", "language"), **fields):
        stage = {
            "name": "one",
            "steps": 3,
            "batch": 1,
            "train": learning,
            "data": [{"kind": "conversations", "path": str(tmp_path / "talk.json")}],
            "optimiser": {"lr": 0.05},
            **fields,
        }
        model = {"start": str(tmp_path / "start"), "lora": lora}
        settings = {
            "task": "chat",
            "name": "mine",
            "model": model,
            "stages": [stage],
            "bf16": False,
            "workers": 0,
            "output": str(tmp_path / "runs"),
            "save_dtype": "float32",
        }
        (tmp_path / "mine.yaml").write_text(json.dumps(settings))
        return tmp_path / "mine.yaml"

    return written


def changed(folder, start):
    """Names of the tensors that differ."""
    before, after = (load_file(each / "model.safetensors") for each in (start, folder))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("parts", [["language"], ["vision"], ["language", "vision"]], ids="+".join)
def test_adapters_learn_and_the_finished_model_has_them_in_its_weights(recipe, parts, tmp_path):
    folder = train(recipe({"parts": parts, "rank": 2}))
    moved = changed(folder, tmp_path / "start")
    assert any(".projector." in name for name in moved)
    language = {name for name in moved if "language_model" in name}
    assert language
    if "language" in parts:  # embeddings and norms stay, which learn where the part learns in full
        assert all("_proj." in name for name in language)
    else:
        assert any("norm" in name for name in language)
    vision = {name for name in moved if ".branches." in name}
    assert any("norm" in name for name in vision) == ("vision" not in parts)
    image = tmp_path / "a.png"
    answer = stepwell.load(folder).ask(image, "What?", max_new_tokens=8)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "start")
    tuned = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    merged = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = StepwellProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(image), text="<image>\nWhat?", return_tensors="pt")
    torch.testing.assert_close(tuned(**inputs).logits, merged(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert answer == stepwell.load(folder).ask(image, "What?", max_new_tokens=8)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "start")


def test_a_part_with_adapters_that_does_not_learn_stays(recipe, tmp_path):
    folder = train(recipe({"parts": ["language"], "rank": 2}, learning=("projector",)))
    assert all(".projector." in name for name in changed(folder, tmp_path / "start"))


def test_of_a_part_of_an_adapted_one_its_adapters_alone_learn(recipe, tmp_path):
    learning = ("vision.branches.0", "vision.interactions", "projector")
    folder = train(recipe({"parts": ["vision"], "rank": 2}, learning=learning))
    moved = changed(folder, tmp_path / "start")
    of_branch = {name for name in moved if ".branches.0." in name}
    assert of_branch
    assert not any("norm" in name or "bias" in name or "embed" in name for name in of_branch)
    assert not any(".branches.1." in name or "language_model" in name for name in moved)
    assert any(".interactions." in name and "norm" in name for name in moved)  # which has no adapters
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "start")
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    for name, tensor in AutoModelForImageTextToText.from_pretrained(folder).state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_dry_run_counts_adapters_alone(recipe):
    text = dry_run(recipe({"parts": ["language"], "rank": 2}, learning=("language",)))
    whole = dry_run(recipe(None, learning=("language",)))
    assert text != whole


def test_adapters_go_on_what_a_recipe_may_name(recipe):
    with pytest.raises(ValueError, match=r"recipe .*model\.lora\.parts"):
        load_recipe(recipe({"parts": ["projector"]}))


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_beside_adapters_are_stored_in_few_bits_and_finished_in_full(recipe, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    file = recipe({"rank": 2, "bits": bits}, learning=("projector", "language"))
    settings = load_recipe(str(file))
    module = find_task("chat")(settings, settings.stages[0]).build()
    stored = {
        name: parameter for name, parameter in module.named_parameters() if not parameter.is_floating_point()
    }
    assert len(stored) == 7 * module.config.text_config.num_hidden_layers
    assert all("base_layer" in name and not parameter.requires_grad for name, parameter in stored.items())
    assert not any("base_layer" in name for name in module.state_dict())

    folder = train(file)
    before, after = (load_file(each / "model.safetensors") for each in (tmp_path / "start", folder))
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    scale = 32 / 2
    for name in before:
        if "language_model" in name and "_proj." in name:
            a, b = (
                adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"]
                for side in "AB"
            )
            torch.testing.assert_close(after[name], before[name] + scale * b @ a)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert isinstance(stepwell.load(folder).ask(tmp_path / "a.png", "What?", max_new_tokens=2), str)


def test_few_bits_are_refused_where_they_do_not_run(recipe, monkeypatch):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    def broken(self, x):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    with pytest.raises(ValueError, match=r"does not run layers of 4 bits on this machine \(no kernel\)"):
        train(recipe({"bits": 4}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"weights of 8 bits need bitsandbytes: pip install"):
        train(recipe({"bits": 8}))


def test_training_over_few_bits_goes_on_where_it_was_stopped(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    lora = {"rank": 2, "bits": 4}
    through = load_file(train(recipe(lora, steps=4)) / "model.safetensors")
    shutil.rmtree(tmp_path / "runs")
    file = recipe(lora, steps=4)
    settings = json.loads(file.read_text()) | {"save_steps": 2}
    file.write_text(json.dumps(settings))
    train(file)
    (stage,) = [path for path in (tmp_path / "runs" / "mine").iterdir() if path.name.startswith("1_")]
    shutil.rmtree(stage / "checkpoint-4")
    shutil.rmtree(stage / "finished")
    shutil.rmtree(tmp_path / "runs" / "mine" / "model")
    resumed = load_file(train(file) / "model.safetensors")
    assert all(torch.equal(through[name], resumed[name]) for name in through)
