"""The releases of INF-LLaVA become folders of ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_releases import MANIFESTS, shapes
from transformers import AutoConfig, AutoModelForCausalLM

import stepwell
from stepwell.models.inf import InfConfig
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.weights.convert import convert, dry_run, read_manifest

NAME = "inf_llava"
WIDTHS = {1024: 32, 4096: 64, 512: 16}
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("name", [NAME, "inf_star_llava"])
def test_every_name_of_the_released_layout_has_its_place(name):
    manifest = MANIFESTS / f"{NAME}.json"
    report = dry_run(manifest, as_=name)
    assert report.ok, report.text()
    assert sorted([*report.used, *report.renamed, *report.dropped]) == sorted(read_manifest(manifest))
    assert set(report.absent.values()) == {"no layer of a language model in this source"}
    assert all("post_layernorm" in dropped for dropped in report.dropped)


def test_a_language_model_without_the_added_word_is_taken_too(tmp_path):
    keys = shapes(NAME)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert keys[key] == [128257, 4096]
        keys[key] = [128256, 4096]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(keys))
    assert dry_run(manifest, as_=NAME).ok


def test_the_language_model_is_llama_3s():
    """What no tensor tells: Meta-Llama-3-8B-Instruct's rotation, and both words that end an answer."""
    fields = PUBLISHED[NAME].text_config
    assert fields is not None
    assert (fields["rope_theta"], fields["num_key_value_heads"]) == (500_000, 8)
    assert (fields["rms_norm_eps"], fields["eos_token_id"]) == (1e-5, [128001, 128009])


@pytest.mark.parametrize("alias", ["WeihuangLin/INF-LLaVA-sft", "inf-llava-sft"])
def test_a_release_is_found_by_its_name(alias):
    published = find_published(alias)
    assert published is not None
    assert published.name == NAME


def test_a_model_is_converted_loaded_and_asked(tmp_path, monkeypatch):
    full = PUBLISHED[NAME]
    assert isinstance(full.settings, InfConfig)
    arguments = {"dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    settings = replace(full.settings, arguments=arguments)
    monkeypatch.setitem(
        PUBLISHED,
        NAME,
        replace(full, settings=settings, text_config={**(full.text_config or {}), **LANGUAGE}),
    )
    tokenizer = build_reader_tokenizer()
    words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(words, special_tokens=True)
    fields = AutoConfig.for_model("llama", **LANGUAGE, vocab_size=len(tokenizer))
    language_model = AutoModelForCausalLM.from_config(fields)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn([_small(key, side) for side in shape], generator=generator) * 0.1
        for key, shape in shapes(NAME).items()
        if not any(f".layers.{layer}." in key for layer in range(2, 24))
        and "embed_tokens" not in key
        and not key.startswith(("model.norm", "lm_head"))
    } | language_model.state_dict()
    source = tmp_path / "source"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(fields.to_dict() | {"model_type": "llava_llama"}))
    tokenizer.save_pretrained(source)
    report = convert(source, tmp_path / "out", as_=NAME)
    assert report.ok, report.text()
    assistant = stepwell.load(tmp_path / "out")
    ours = assistant.model.state_dict()
    for theirs, name in {
        "spatial_embed.attention.linears.1.bias": "enhancement.attentions.0.key.bias",
        "spatial_embed.attention.ln.weight": "enhancement.attentions.0.norm.weight",
        "spatial_embed.ffn_crop.0.weight": "enhancement.fusion.of_local.0.weight",
        "spatial_embed.ffn_stride.2.weight": "enhancement.fusion.of_global.2.weight",
        "spatial_embed.ln_fuse.bias": "enhancement.fusion.norm.bias",
        "mm_projector.2.weight": "projector.2.weight",
    }.items():
        assert torch.equal(ours[f"model.vision.{name}"], state[f"model.{theirs}"]), name
    layout = assistant.processor.image_processor.geometry.layout((500, 700))
    assert (layout.num_visual, len(layout.views)) == (576, 10)
    assert isinstance(assistant.ask(Image.new("RGB", (30, 900)), "hello", max_new_tokens=2), str)


def _small(name: str, side: int) -> int:
    if "ffn_" in name and side == 64:
        return 2
    if "vision_model" in name and side == 4096:
        return 64
    return WIDTHS.get(side, side)
