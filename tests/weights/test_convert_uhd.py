"""The releases of LLaVA-UHD become folders of ours: whole models, and parts of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_releases import MANIFESTS, shapes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import stepwell
from stepwell.keys.report import FitError
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.models.uhd import UhdV2Config
from stepwell.train.recipe import load_recipe
from stepwell.weights.convert import convert, dry_run, read_manifest

QWEN2 = "uhd_v2_qwen2_7b"
PROJECTOR = "uhd_v2_projector_vicuna_7b"
UPSAMPLER = "uhd_v2_upsampler_clip_l"
MANIFEST = {PROJECTOR: "uhd_v2_mm_projector_bin_vicuna_7b", UPSAMPLER: "uhd_v2_vdim_stage0"}
WIDTHS = {1024: 32, 4096: 64, 3584: 64, 3 * 4096: 192, 3 * 3584: 192, 4 * 4096: 256, 4 * 3584: 256}
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 29900,  # so that Llama's comma is a word
}


@pytest.mark.parametrize("name", ["uhd_v2_vicuna_7b", QWEN2, "uhd_v1_vicuna_13b", PROJECTOR, UPSAMPLER])
def test_every_name_of_a_released_layout_has_its_place(name):
    manifest = MANIFESTS / f"{MANIFEST.get(name, name)}.json"
    report = dry_run(manifest, as_=name)
    assert report.ok, report.text()
    assert sorted([*report.renamed, *report.dropped]) == sorted(read_manifest(manifest))
    assert all("language model" in why for why in report.absent.values())


def test_dead_weights_may_be_there_or_not(tmp_path):
    """A second encoder, its norm, the counter of older transformers, what version 1 left."""
    keys = shapes("uhd_v2_vicuna_7b")
    dead = {name for name in keys if ".upsampler.model." in name}
    dead |= {"model.mm_projector.query", "model.mm_projector.kv_proj.weight"}
    assert len(dead) > 300
    tower = "model.vision_tower.vision_tower.vision_model.embeddings"
    reports = []
    for names in (keys, {k: v for k, v in keys.items() if k not in dead}):
        manifest = tmp_path / "manifest.json"
        manifest.write_text(json.dumps(names | {f"{tower}.position_ids": [1, 577]}))
        reports.append(dry_run(manifest, as_="uhd_v2_vicuna_7b"))
    whole, lean = reports
    assert whole.ok, whole.text()
    assert lean.ok, lean.text()
    assert dead <= whole.dropped.keys()
    assert whole.renamed == lean.renamed


def test_the_trained_position_table_is_kept_and_another_release_is_refused():
    report = dry_run(MANIFESTS / f"{QWEN2}.json", as_=QWEN2)
    assert report.renamed["model.mm_projector.pos_embed"] == "model.vision.projector.position"
    report = dry_run(MANIFESTS / f"{QWEN2}.json", as_="uhd_v2_vicuna_7b")
    assert not report.ok
    assert "of another shape" in report.complaint()


def test_levels_that_a_release_does_not_read_are_dropped_by_name():
    report = dry_run(MANIFESTS / f"{QWEN2}.json", as_=QWEN2)
    unread = {name for name, why in report.dropped.items() if "does not read" in why}
    prefix = "model.mm_projector.feature"
    assert unread == {
        *(f"{prefix}s_{level}x_projector.{kind}" for level in (2, 8) for kind in ("weight", "bias")),
        *(f"{prefix}_{level}x_embedding" for level in (2, 8)),
    }


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("YipengZhang/LLaVA-UHD-v2", "uhd_v2_vicuna_7b"),
        ("YipengZhang/LLaVA-UHD-v2-Qwen2.0-7B", QWEN2),
        ("llava-uhd-v2-vicuna-13b", "uhd_v2_vicuna_13b"),
        ("guozonghao96/llava-uhd-144-13b", "uhd_v1_vicuna_13b"),
        ("YipengZhang/LLaVA-UHD-v2:mm_projector.bin", PROJECTOR),
        ("clip-large-vdim.ckpt", UPSAMPLER),
    ],
)
def test_a_release_is_found_by_its_name(alias, name):
    published = find_published(alias)
    assert published is not None
    assert published.name == name


def small(name, shape):
    """An official tensor's shape in the small model: 32 channels of vision, 64 of language."""
    if name.endswith("position_embedding.weight"):
        return [577, 32]
    return [WIDTHS.get(side, side) for side in shape]


@pytest.fixture
def shrunk(monkeypatch):
    """The Qwen2 release at these widths, two layers of everything."""
    for name in (QWEN2, PROJECTOR, UPSAMPLER):
        full = PUBLISHED[name]
        assert isinstance(full.settings, UhdV2Config)
        settings = replace(
            full.settings,
            arguments={"dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0},
            windows=replace(full.settings.windows, num_heads=4),
        )
        text_config = {**(full.text_config or {}), **LANGUAGE}
        monkeypatch.setitem(PUBLISHED, name, replace(full, settings=settings, text_config=text_config))


def small_state(name):
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(small(key, shape), generator=generator) * 0.1
        for key, shape in shapes(MANIFEST.get(name, name)).items()
        if not any(f".layers.{layer}." in key for layer in range(2, 24))
    }


def test_a_model_of_qwen2_is_converted_loaded_and_asked(shrunk, tmp_path):
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **LANGUAGE))
    state = small_state(QWEN2) | language_model.state_dict()
    source = tmp_path / "source"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    fields = language_model.config.to_dict() | {"model_type": "llava_qwen", "feature_scale_mask": 5}
    (source / "config.json").write_text(json.dumps(fields))
    _tokenizer().save_pretrained(source)
    report = convert(source, tmp_path / "out", as_=QWEN2)
    assert report.ok, report.text()
    assistant = stepwell.load(tmp_path / "out")
    ours = assistant.model.state_dict()
    assert torch.equal(ours["model.vision.projector.position"], state["model.mm_projector.pos_embed"])
    queries = [state[f"model.mm_projector.query_{i}"] for i in (1, 2, 3, 4)]
    assert torch.equal(ours["model.vision.projector.queries"], torch.stack(queries))
    codes = [state[f"model.mm_projector.feature_{level}x_embedding"][0, 0] for level in (1, 4)]
    assert torch.equal(ours["model.vision.projector.level_codes"], torch.stack(codes))
    assert torch.equal(ours["model.vision.projector.out.weight"], state["model.mm_projector.proj"].t())
    fixup = state["model.mm_projector.upsampler.upsampler.fixup_proj.1.weight"]
    assert torch.equal(ours["model.vision.upsampler.corrections.0.linear.weight"], fixup[:, :, 0, 0])
    prompt = assistant.processor(images=Image.new("RGB", (700, 500)), text="<image> hello")
    ids = prompt["input_ids"][0]
    layout = assistant.processor.image_processor.geometry.layout((500, 700))
    assert layout.tiles == (2, 2)
    assert (ids.count(13), ids.count(29892)) == (2, 2)
    assert isinstance(assistant.ask(Image.new("RGB", (30, 900)), "hello", max_new_tokens=2), str)


def _tokenizer():
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "hello", "user", "assistant", "system", "\n"]
    words += [f"word{i}" for i in range(29895 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )


def test_parts_become_a_file_each_that_a_model_starts_from(shrunk, tmp_path):
    state = small_state(PROJECTOR)
    torch.save(state, tmp_path / "mm_projector.bin")
    report = convert(tmp_path / "mm_projector.bin", tmp_path / "out", as_=PROJECTOR)
    assert report.ok, report.text()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["conversion.json", "projector.safetensors", "vision.upsampler.safetensors"]
    settings = PUBLISHED[PROJECTOR].settings
    assert isinstance(settings, UhdV2Config)
    vision = settings.build(64)
    for part, file in (("projector", "projector"), ("upsampler", "vision.upsampler")):
        tensors = load_file(tmp_path / "out" / f"{file}.safetensors")
        vision.get_submodule(part).load_state_dict(tensors, strict=True)
    assert torch.equal(vision.projector.position, state["model.mm_projector.pos_embed"])
    with pytest.raises(FileExistsError, match="not empty"):
        convert(tmp_path / "mm_projector.bin", tmp_path / "out", as_=PROJECTOR)
    convert(tmp_path / "mm_projector.bin", tmp_path / "out", as_=PROJECTOR, overwrite=True)
    state.pop("model.mm_projector.ln_q.weight")
    torch.save(state, tmp_path / "mm_projector.bin")
    with pytest.raises(FitError, match="1 missing"):
        convert(tmp_path / "mm_projector.bin", tmp_path / "other", as_=PROJECTOR)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_lightning_becomes_an_upsampler(shrunk, tmp_path):
    state = small_state(UPSAMPLER)
    torch.save({"state_dict": state, "epoch": 0, "global_step": 2000}, tmp_path / "clip-large-vdim.ckpt")
    report = convert(tmp_path / "clip-large-vdim.ckpt", tmp_path / "out", as_=UPSAMPLER)
    assert report.ok, report.text()
    tensors = load_file(tmp_path / "out" / "vision.upsampler.safetensors")
    assert torch.equal(tensors["stages.1.keys.3.weight"], state["upsampler.up2.range_proj.3.weight"])
    settings = PUBLISHED[UPSAMPLER].settings
    assert isinstance(settings, UhdV2Config)
    settings.build(64).upsampler.load_state_dict(tensors, strict=True)


def test_a_release_without_its_encoder_says_so(shrunk, tmp_path):
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **LANGUAGE))
    state = small_state(QWEN2) | language_model.state_dict()
    state = {k: v for k, v in state.items() if "vision_tower" not in k}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(FitError, match="no encoder in this source"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", as_=QWEN2)


def test_recipes_name_what_the_releases_have():
    for recipe, name in (("uhd_v2", "uhd_v2_vicuna_7b"), ("uhd_v1", "uhd_v1_vicuna_13b")):
        ours, theirs = load_recipe(recipe).model.vision, PUBLISHED[name].settings
        assert replace(ours, newline=(13,), comma=(29892,)) == theirs
