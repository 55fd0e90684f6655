"""Parts that start from weights of others: what the whole then computes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.cli import main
from stepwell.keys.report import FitError
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.parts import load_parts
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.train.run import train

VIT: dict[str, Any] = {
    "dim": 32,
    "depth": 2,
    "num_heads": 4,
    "position_grid": (4, 4),
    "layer_scale": None,
    "norm_eps": 1e-12,
}
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "phi": {},  # its head has a bias
    "gpt_neox": {},  # its head is called embed_out
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
}


def drawn(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.2)
    return model.eval()


def causal(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **LANGUAGE_MODELS[family]})
    return drawn(transformers.AutoModelForCausalLM.from_config(config))


def assistant(text: Any, **vision: Any) -> StepwellForConditionalGeneration:
    settings = PlainConfig(encoder="deit_t", size=64, arguments=VIT, **vision)
    return StepwellForConditionalGeneration(StepwellConfig(settings, text, image_token_id=60)).eval()


def transformers_vit() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=64, patch_size=16)
    return drawn(transformers.ViTModel(config))


IDS = torch.tensor([[5, 9, 21, 3, 40]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_language_model_brings_its_head(family: str, tmp_path: Path) -> None:
    theirs = causal(family)
    theirs.save_pretrained(tmp_path)
    ours = assistant(theirs.config)
    report = load_parts(ours, {"language": str(tmp_path)})["language"]
    assert report.ok
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert ours.lm_head.weight is ours.get_input_embeddings().weight or not theirs.config.tie_word_embeddings


@pytest.mark.parametrize("file", ["weights.bin", "weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_a_language_model_from_a_single_file(family: str, file: str, tmp_path: Path) -> None:
    theirs = causal(family)
    state = {name: t.clone() for name, t in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    ours = assistant(theirs.config)
    load_parts(ours, {"language": tmp_path / file})
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_a_language_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would invent one, with a warning."""
    theirs = causal("llama")
    theirs.model.save_pretrained(tmp_path)
    ours = assistant(theirs.config)
    with pytest.raises(ValueError, match=r"parts\.language: .* 1 missing \(lm_head\.weight\)"):
        load_parts(ours, {"language": str(tmp_path)})
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"parts\.language: .*gives no causal language model"):
        load_parts(ours, {"language": str(tmp_path)})


def test_a_language_model_of_another_size_is_refused_with_the_report(tmp_path: Path) -> None:
    theirs = causal("llama")
    theirs.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2})
    ours = assistant(config)
    before = logits(ours)
    with pytest.raises(FitError, match=r"^parts\.language: .* 9 missing \(model\.layers\.2\.") as error:
        load_parts(ours, {"language": str(tmp_path)})
    assert len(error.value.report.missing) == 9
    assert torch.equal(logits(ours), before)


def test_what_is_one_tensor_here_has_to_be_one_there(tmp_path: Path) -> None:
    """A head of its own would overwrite the embedding, or be lost."""
    theirs = causal("llama")
    theirs.save_pretrained(tmp_path)
    sizes = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ours = assistant(transformers.LlamaConfig(**sizes))
    with pytest.raises(
        FitError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor here"
    ):
        load_parts(ours, {"language": str(tmp_path)})


def test_tensors_that_a_language_model_has_no_place_for_are_refused(tmp_path: Path) -> None:
    theirs = causal("llama")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    ours = assistant(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"parts\.language: .* 9 unknown \(model\.layers\.1\."):
        load_parts(ours, {"language": str(tmp_path)})


@pytest.mark.parametrize("damage", ["cut", "config"])
def test_a_damaged_folder_of_a_language_model_is_refused_in_words(damage: str, tmp_path: Path) -> None:
    theirs = causal("llama")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if damage == "cut" else "config.json")
    file.write_bytes(
        file.read_bytes()[:200] if damage == "cut" else b'{"model_type": "llama", "hidden_size": "x"}'
    )
    with pytest.raises(ValueError, match=r"parts\.language: .*gives no causal language model"):
        load_parts(assistant(theirs.config), {"language": str(tmp_path)})


def test_what_is_within_a_part_comes_behind_it(tmp_path: Path) -> None:
    theirs = causal("llama")
    theirs.save_pretrained(tmp_path / "whole")
    save_file({"weight": torch.full((60, 32), 0.5)}, tmp_path / "head.safetensors")
    ours = assistant(theirs.config)
    load_parts(ours, {"language.lm_head": tmp_path / "head.safetensors", "language": str(tmp_path / "whole")})
    assert (ours.lm_head.weight == 0.5).all()


def test_a_branch_starts_from_an_encoder_of_others(tmp_path: Path) -> None:
    theirs = transformers_vit()
    theirs.save_pretrained(tmp_path)
    ours = assistant(causal("llama").config, select_layer=-1)
    report = load_parts(ours, {"vision.branches.0": str(tmp_path)})["vision.branches.0"]
    assert report.dropped["embeddings.cls_token"] == "this encoder has no class token"
    (encoder,) = ours.model.vision.encoders
    kernel = theirs.embeddings.patch_embeddings.projection.weight
    assert torch.equal(encoder.patch_embed.proj.weight, kernel)


def test_any_part_starts_from_a_whole_model_of_ours(tmp_path: Path) -> None:
    source = drawn(assistant(causal("qwen2").config))
    source.save_pretrained(tmp_path)
    for part in ("projector", "vision", "vision.branches.0", "language"):
        ours = assistant(source.config.text_config)
        kept = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        report = load_parts(ours, {part: str(tmp_path)})[part]
        assert "of other parts" in report.dropped.values()
        prefixes = (ours.parts[part.removesuffix(".0")], *(["lm_head"] if part == "language" else []))
        for name, tensor in ours.state_dict().items():
            expected = source.state_dict() if name.startswith(prefixes) else kept
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("file", ["projector.safetensors", "projector.bin"])
def test_any_part_starts_from_a_file_of_its_own_tensors(file: str, tmp_path: Path) -> None:
    ours, source = (drawn(assistant(causal("llama").config)).model.vision.projector for _ in range(2))
    state = {name: tensor + 1 for name, tensor in source.state_dict().items()}
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    model = assistant(causal("llama").config)
    load_parts(model, {"projector": tmp_path / file})
    assert all(torch.equal(t, state[name]) for name, t in model.model.vision.projector.state_dict().items())
    del ours
    with pytest.raises(FitError, match=r"parts\.projector: .*changed nothing"):
        load_parts(model, {"projector": tmp_path / file})


@pytest.mark.parametrize("part", ["vision.branch.0", "vision.branches.7", "nonsense", "visio"])
def test_a_part_that_there_is_not_is_refused(part: str) -> None:
    with pytest.raises(
        ValueError, match=rf"parts\.{part}: the model has no such part; its parts are language"
    ):
        load_parts(assistant(causal("llama").config), {part: "nowhere"})


def test_pyramids_for_perception_start_from_encoders_too(tmp_path: Path) -> None:
    theirs = transformers_vit()
    theirs.save_pretrained(tmp_path)
    branches = (BranchConfig(encoder="deit_t", size=64, arguments=VIT),)
    kernel = theirs.embeddings.patch_embeddings.projection.weight
    dense = PyramidBackbone(
        PyramidBackboneConfig(pyramid=DenseSettings(branches=branches, merge="none", neck_norm="layernorm"))
    )
    classifier = PyramidForImageClassification(
        PyramidClassifierConfig(pyramid=ClassifierSettings(branches=branches), num_labels=3)
    )
    for model in (dense, classifier):
        load_parts(model, {"vision.branches.0": tmp_path})
        assert torch.equal(model.pyramid.encoder.branches[0].patch_embed.proj.weight, kernel)


@pytest.fixture
def chat(tmp_path: Path, tokenizer: Any) -> dict[str, Any]:
    """A recipe of two stages whose parts start from folders of transformers; two conversations."""
    theirs = causal("llama")
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "vocab_size": len(tokenizer)})
    theirs = drawn(transformers.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    transformers_vit().save_pretrained(tmp_path / "vit")
    talk = [
        {
            "id": str(i),
            "conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "yes"}],
        }
        for i in range(2)
    ]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    stage = {"steps": 1, "batch": 2, "data": [{"kind": "conversations", "path": str(tmp_path / "talk.json")}]}
    arguments = {**VIT, "position_grid": [4, 4]}
    return {
        "task": "chat",
        "name": "started",
        "output": str(tmp_path / "runs"),
        "bf16": False,
        "save_dtype": "float32",
        "model": {
            "vision": {"kind": "plain", "encoder": "deit_t", "size": 64, "arguments": arguments},
            "parts": {"vision.branches.0": str(tmp_path / "vit"), "language": str(tmp_path / "llama")},
            "template": "chatml_direct",
        },
        "stages": [
            {"name": "align", "train": ["projector"], **stage},
            {"name": "tune", "train": ["projector"], **stage},
        ],
    }


def test_a_recipe_starts_from_parts_and_says_what_became_of_them(
    chat: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "stepwell.train.chat.load_parts", lambda *a, **k: (asked.append(a), load_parts(*a, **k))[1]
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chat))
    folder = train(tmp_path / "recipe.yaml")
    said = capsys.readouterr().out
    assert f"vision.branches.0 from {tmp_path / 'vit'}: every tensor has its place" in said
    assert "this encoder has no class token: embeddings.cls_token" in said
    assert len(asked) == 1  # and not again for the second stage, nor to write the model
    model = StepwellForConditionalGeneration.from_pretrained(folder)
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    torch.testing.assert_close(logits(model), logits(llama))
    kernel = transformers.ViTModel.from_pretrained(tmp_path / "vit").embeddings.patch_embeddings.projection
    assert torch.equal(model.model.vision.encoders[0].patch_embed.proj.weight, kernel.weight)


def test_a_part_that_is_not_there_is_refused_in_one_line(
    chat: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat["model"]["parts"]["vision.branches.0"] = str(tmp_path / "nowhere")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chat))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err == f"stepwell: no such file or folder: {tmp_path / 'nowhere'}\n"


def test_a_file_says_no_configuration_of_a_language_model(chat: dict[str, Any], tmp_path: Path) -> None:
    chat["model"]["parts"]["language"] = str(tmp_path / "llama/model.safetensors")
    chat["model"]["tokenizer"] = str(tmp_path / "llama")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chat))
    with pytest.raises(ValueError, match=r"is a file, which says no configuration: give text too"):
        train(tmp_path / "recipe.yaml")


def test_a_later_run_starts_from_the_parts_of_an_earlier_one(chat: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chat))
    first = train(tmp_path / "recipe.yaml")
    chat |= {"name": "second", "seed": 5}
    chat["model"]["parts"] = {"language": str(first), "projector": str(first)}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(chat))
    second = train(tmp_path / "second.yaml")
    one, two = (StepwellForConditionalGeneration.from_pretrained(folder) for folder in (first, second))
    assert torch.equal(logits(one), logits(two))
