"""Released checkpoints become folders of ours: every name accounted for, every number in its place."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_releases import LLAMA, MANIFESTS, shrink, small_state
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedTokenizerFast,
)

import stepwell
from stepwell.keys.checkpoint import open_checkpoint
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.published.papers import PUBLISHED
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD
from stepwell.weights.build import text_config
from stepwell.weights.convert import FitError, convert, dry_run, read_manifest

DETECTOR = "piip_det_ct_vs_vb_1024_672_448"
FOUR = "piip_det_tsbl_1568_1120_672_448_as_released_code"
CLASSIFIER = "piip_cls_sbl_320_160_96"
CHAT = "piip_llava_clip_bl_512_256_7b"
HEADS_1024 = "piip_det_maskrcnn_heads_in1024"
LLAVA = {"model_type": "llava_llama", "mm_hidden_size": 1024, "use_cache": False}


@pytest.mark.parametrize("name", [DETECTOR, FOUR, CLASSIFIER, CHAT])
def test_every_name_of_a_released_layout_has_its_place(name):
    report = dry_run(MANIFESTS / f"{name}.json", as_=name)
    assert report.ok, report.text()
    told = [*report.used, *report.renamed, *report.dropped]
    assert sorted(told) == sorted(read_manifest(MANIFESTS / f"{name}.json"))
    lacks = {CHAT: "no language model", CLASSIFIER: ""}.get(name, "no head")
    assert all(lacks in why for why in report.absent.values())
    assert bool(report.absent) == bool(lacks)


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        (FOUR, FOUR.replace("released_code", "config")),
        (CLASSIFIER, "piip_cls_sbl_384_192_128"),
        (CHAT, "piip_llava_clip_bl_512_448_13b"),
        (DETECTOR, "piip_det_ct_cs_vb_1024_672_448"),
    ],
)
def test_another_model_is_refused_by_its_shapes_or_names(manifest, name):
    report = dry_run(MANIFESTS / f"{manifest}.json", as_=name)
    assert not report.ok
    assert "\n" not in report.complaint()
    assert name in report.complaint()


@pytest.mark.parametrize(
    ("name", "timm_name"), [("deit_b_224", "deit_base_patch16_224"), ("vit_l_224", "vit_large_patch16_224")]
)
def test_a_network_that_is_alone_comes_without_the_name_of_a_branch(name, timm_name, tmp_path):
    with torch.device("meta"):
        vit = timm.create_model(timm_name)
    manifest = tmp_path / "vit.json"
    manifest.write_text(json.dumps({key: list(tensor.shape) for key, tensor in vit.state_dict().items()}))
    report = dry_run(manifest, as_=name)
    assert report.ok, report.text()
    assert not report.dropped


@pytest.mark.parametrize("name", ["vitdet_b_1024", "internvit_6b_1024", "convnext_b_1024"])
def test_a_dense_network_that_is_alone_has_the_names_of_the_official_class(name, tmp_path):
    """Written out here as the official single-branch classes name them."""
    published = PUBLISHED[name]
    if name == "convnext_b_1024":
        encoder = ConvNextModel(ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3]))
        shapes = {f"convnext_model.{n}": list(t.shape) for n, t in encoder.state_dict().items()}
    else:
        dim, depth, rms = (768, 12, False) if name == "vitdet_b_1024" else (3200, 48, True)
        scales = ("ls1.gamma", "ls2.gamma") if rms else ("gamma_1", "gamma_2")
        shapes = {"pos_embed": [1, 14 * 14 + rms, dim], "patch_embed.proj.weight": [dim, 3, 16, 16]}
        layers = {"attn.proj": [dim, dim], "mlp.fc1": [4 * dim, dim], "mlp.fc2": [dim, 4 * dim]}
        for i in range(depth):
            block = {f"{n}.weight": shape for n, shape in layers.items()}
            block |= {f"{n}.bias": shape[:1] for n, shape in layers.items()}
            block |= {"attn.qkv.weight": [3 * dim, dim]} | {key: [dim] for key in scales}
            norms = ("norm1", "norm2", *(("attn.q_norm", "attn.k_norm") if rms else ()))
            block |= {f"{n}.weight": [dim] for n in norms}
            block |= {} if rms else {"attn.qkv.bias": [3 * dim], "norm1.bias": [dim], "norm2.bias": [dim]}
            shapes |= {f"blocks.{i}.{n}": shape for n, shape in block.items()}
        shapes |= {f"{n}.weight": [dim, dim, 2, 2] for n in ("up1.0", "up1.3", "up2.0")}
        shapes["up1.1.weight"] = [dim]
        biases = ("patch_embed.proj", "up1.0", "up1.1", "up1.3", "up2.0")
        shapes |= {f"{n}.bias": [dim] for n in biases}
    manifest = tmp_path / "alone.json"
    manifest.write_text(json.dumps({f"backbone.{n}": shape for n, shape in shapes.items()}))
    report = dry_run(manifest, as_=published.name)
    assert report.ok, report.text()


def test_the_four_branch_quirk_shows_in_the_shapes_of_branch_4_alone():
    report = dry_run(MANIFESTS / f"{FOUR}.json", as_=FOUR.replace("released_code", "config"))
    places = ("encoder.branches.3.", "encoder.interactions.", "merges.0.stacks.3.0.")
    assert report.wrong_shape
    assert all(name.removeprefix("backbone.pyramid.").startswith(places) for name in report.wrong_shape)


def test_a_detector_is_converted_and_loaded(tmp_path, monkeypatch):
    name = "piip_det_tsbl_1568_1120_672_448_as_released_code"
    shrink(name, monkeypatch)
    state = small_state(name, HEADS_1024)
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "out", as_=name, max_shard_bytes=1_000_000)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["ok"]

    model = stepwell.load(tmp_path / "out")
    ours = model.state_dict()
    for theirs, our in {
        "branch1.pos_embed": "encoder.branches.0.position.table",
        "branch4.blocks.1.gamma_2": "encoder.branches.3.blocks.1.scale2.gamma",
        "branch2.blocks.0.attn.qkv.weight": "encoder.branches.1.blocks.0.attn.qkv.weight",
        "interactions.1.interaction_units_34.branch2to1_injector.ca_gamma": (
            "encoder.interactions.1.units.0.messages.0.injector.gate"
        ),
        "interactions.0.interaction_units_12.branch1to2_proj.weight": (
            "encoder.interactions.0.units.2.messages.1.project.weight"
        ),
        "merge_branch3.4.bias": "merges.0.stacks.2.4.bias",
        "fpn1.3.weight": "neck.stages.0.3.weight",
    }.items():
        assert torch.equal(
            state[f"backbone.{theirs}"].flatten(), ours[f"backbone.pyramid.{our}"].flatten()
        ), theirs
    weights = torch.stack([state[f"backbone.w{k}"] for k in range(1, 5)])
    assert torch.equal(ours["backbone.pyramid.merges.0.weights"], weights)
    assert torch.equal(ours["head.box.classes.weight"], state["roi_head.bbox_head.fc_cls.weight"])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.long_limit, processor.short_limit, processor.size_divisor) == (1568, 941, 224)
    assert model.config.id2label[79] == "toothbrush"
    with torch.inference_mode():
        found = model(torch.ones(1, 3, 224, 448))
    assert found.pred_masks.shape[2:] == (28, 28)
    assert 0 <= found.labels.min() <= found.labels.max() < 80


def test_a_detector_without_its_head_is_no_detector(tmp_path, monkeypatch):
    name = "piip_det_tsbl_1568_1120_672_448_as_released_code"
    shrink(name, monkeypatch)
    torch.save(small_state(name), tmp_path / "x.pth")
    with pytest.raises(FitError, match="no head in this source"):
        convert(tmp_path / "x.pth", tmp_path / "out", as_=name)


def test_a_classifier_is_converted_and_loaded(tmp_path, monkeypatch):
    shrink(CLASSIFIER, monkeypatch)
    state = small_state(CLASSIFIER)
    torch.save({"model": state, "model_ema": state}, tmp_path / "x.pth")
    report = convert(tmp_path / "x.pth", tmp_path / "out", as_=CLASSIFIER)
    assert any("model_ema" in note for note in report.notes)
    model = stepwell.load(tmp_path / "out")
    ours = model.state_dict()
    table = state["branch2.pos_embed"][0, 1:]  # without the class slot, which is never added
    assert torch.equal(ours["pyramid.encoder.branches.1.position.table"], table)
    assert torch.equal(ours["pyramid.head.classifiers.2.weight"], state["branch3.head.weight"])
    assert torch.equal(ours["pyramid.head.norms.0.bias"], state["branch1.norm.bias"])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(Image.new("RGB", (400, 200), "black"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 320, 320)
    torch.testing.assert_close(pixels[0, :, 0, 0], -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD))
    with torch.inference_mode():
        assert model(pixels).logits.shape == (1, 1000)


@pytest.fixture
def tokenizer_folder(tmp_path):
    words = ["<unk>", "<s>", "</s>", "how", "much", "is", "it", "?", "USER:", "ASSISTANT:"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def chat_source(folder, kind="llama", config=lambda fields: fields | LLAVA, **fields):
    """A sharded folder as transformers writes it, in half precision. Returns its tensors and language model.

    config: what is written to config.json, of the language model's fields; nothing for None.
    """
    language_model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=10, **{**LLAMA, **fields}), dtype=torch.bfloat16
    )
    tied = language_model.all_tied_weights_keys
    tensors = small_state(CHAT) | {k: v for k, v in language_model.state_dict().items() if k not in tied}
    state = {k: v.bfloat16() for k, v in tensors.items()}
    folder.mkdir()
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
    for part in set(weight_map.values()):
        save_file({name: t for name, t in state.items() if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config(language_model.config.to_dict())))
    return state, language_model.eval()


def test_an_assistant_is_converted_loaded_and_asked(tmp_path, monkeypatch, tokenizer_folder):
    shrink(CHAT, monkeypatch)
    state, _ = chat_source(tmp_path / "source", rms_norm_eps=0.125, num_attention_heads=4)
    report = convert(
        tmp_path / "source", tmp_path / "out", as_=CHAT, tokenizer=tokenizer_folder, max_shard_bytes=1_000_000
    )
    assert report.ok
    assert not report.absent
    assistant = stepwell.load(tmp_path / "out")
    assert assistant.model.dtype == torch.bfloat16
    assert assistant.model.config.text_config.rms_norm_eps == 0.125
    assert assistant.model.config.text_config.num_attention_heads == 4
    assert assistant.model.config.image_token_id == 10  # behind the last word
    ours = assistant.model.state_dict()
    layer = "model.vision_tower.vision_tower.branch2.clip_model.encoder.layers.1.self_attn."
    qkv = torch.cat([state[f"{layer}{part}_proj.bias"] for part in "qkv"])
    assert torch.equal(ours["model.vision.encoder.branches.1.blocks.1.attn.qkv.bias"], qkv)
    projector = state["model.mm_projector.branch1.6.weight"]
    assert torch.equal(ours["model.vision.projector.stacks.0.3.weight"], projector)
    assert torch.equal(ours["lm_head.weight"], state["lm_head.weight"])
    assert torch.equal(
        ours["model.language_model.layers.1.mlp.down_proj.weight"],
        state["model.layers.1.mlp.down_proj.weight"],
    )
    answer = assistant.ask(Image.new("RGB", (64, 48), "red"), "how much is it ?", max_new_tokens=3)
    assert isinstance(answer, str)


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        (
            "llama",
            lambda fields: fields | LLAVA,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        ),
        ("qwen2", lambda fields: fields, {"num_key_value_heads": 2}),
        (
            "qwen2",
            lambda fields: {"text_config": fields, "model_type": "llava"},
            {"num_key_value_heads": 8, "tie_word_embeddings": True},
        ),
        ("llama", None, {"rms_norm_eps": 1e-5}),  # what is published
    ],
)
def test_any_language_model_answers_as_in_transformers(tmp_path, monkeypatch, kind, config, fields):
    shrink(CHAT, monkeypatch)
    _, language_model = chat_source(tmp_path / "source", kind, config, **fields)
    convert(tmp_path / "source", tmp_path / "out", as_=CHAT)
    model = StepwellForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 5, 3, 9]])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, language_model(input_ids=ids).logits)
    assert model.config.text_config.use_cache
    assert not hasattr(model.config.text_config, "mm_hidden_size")


def test_sizes_that_contradict_the_tensors_are_one_line(tmp_path, monkeypatch):
    shrink(CHAT, monkeypatch)
    chat_source(tmp_path / "source", config=lambda fields: fields | {"vocab_size": 11})
    with pytest.raises(FitError, match=r"2 of another shape \(.*: expected 11x512, got 10x512\)$"):
        convert(tmp_path / "source", tmp_path / "out", as_=CHAT)


def test_another_language_model_needs_its_config(tmp_path, monkeypatch):
    shrink(CHAT, monkeypatch)
    chat_source(tmp_path / "source", config=None, num_hidden_layers=3)
    with pytest.raises(FitError, match=r"unknown \(.*; its config.json has to lie beside it$"):
        convert(tmp_path / "source", tmp_path / "out", as_=CHAT)


def test_a_config_says_all_where_nothing_is_published():
    fields = {"model_type": "mistral", "hidden_size": 64, "rope_theta": 5.0, "architectures": ["Assistant"]}
    config = text_config({}, fields, vocab_size=7)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("mistral", 64, 7)
    assert config.rope_parameters["rope_theta"] == 5.0
    assert config.architectures is None
    assert text_config({}, {**fields, "vocab_size": 8}, vocab_size=7).vocab_size == 8
    with pytest.raises(ValueError, match="describes no language model"):
        text_config({}, {"hidden_size": 64})


def test_what_is_published_of_one_architecture_says_nothing_of_another():
    fields = {"model_type": "mistral", "num_attention_heads": 4}
    assert text_config({"model_type": "llama", "hidden_size": 64}, fields) == text_config({}, fields)
    assert text_config({"model_type": "mistral", "hidden_size": 64}, fields).hidden_size == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"num_attention_heads": 0}, "zero"),
        ({"hidden_size": "wide"}, "expected int"),
        ({"text_config": 3}, "no attribute"),
    ],
)
def test_a_config_that_describes_no_language_model_is_one_line(fields, words):
    with pytest.raises(ValueError, match=f"^config.json describes no language model: .*{words}") as caught:
        text_config(PUBLISHED[CHAT].text_config, fields)
    assert "\n" not in str(caught.value)


def test_an_assistant_without_tokenizer_says_so(tmp_path, monkeypatch):
    shrink(CHAT, monkeypatch)
    chat_source(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", as_=CHAT)
    assert any("no tokenizer" in note for note in report.notes)
    assert StepwellForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_id == 10
    with pytest.raises(ValueError, match="tokenizer"):
        stepwell.load(tmp_path / "out")


def test_a_tokenizer_that_cannot_be_read_stops_the_conversion(tmp_path, monkeypatch):
    shrink(CHAT, monkeypatch)
    chat_source(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"no sentencepiece")
    with pytest.raises(ValueError, match=r"cannot be read: .* pip install sentencepiece") as caught:
        convert(tmp_path / "source", tmp_path / "out", as_=CHAT)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


def test_a_vision_tower_alone_is_no_assistant(tmp_path, monkeypatch):
    shrink(CHAT, monkeypatch)
    save_file(small_state(CHAT), tmp_path / "x.safetensors")
    with pytest.raises(FitError, match="no language model"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", as_=CHAT)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("change", "word", "heading"),
    [
        (lambda state: state.pop("branch1.head.bias"), "1 missing", "missing"),
        (lambda state: state.update(extra=torch.ones(1)), "1 unknown", "unknown"),
        (
            lambda state: state.update({"branch1.head.bias": torch.ones(7)}),
            "1 of another shape",
            "wrong_shape",
        ),
        (lambda state: state.pop("branch1.pos_embed"), "1 missing", "missing"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, monkeypatch, change, word, heading):
    shrink(CLASSIFIER, monkeypatch)
    state = small_state(CLASSIFIER)
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(FitError, match=word) as caught:
        convert(tmp_path / "x.safetensors", tmp_path / "out", as_=CLASSIFIER)
    assert "\n" not in str(caught.value)
    assert len(getattr(caught.value.report, heading)) == 1
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    shrink(CLASSIFIER, monkeypatch)
    save_file(small_state(CLASSIFIER), tmp_path / "x.safetensors")
    written = []

    def full_after_two(tensors, path, metadata):
        written.append(path)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("stepwell.weights.write.save_file", full_after_two)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", as_=CLASSIFIER, max_shard_bytes=100_000)
    assert len(written) == 3
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_output_is_sharded_as_asked(tmp_path, monkeypatch):
    shrink(CLASSIFIER, monkeypatch)
    save_file(small_state(CLASSIFIER), tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "out", as_=CLASSIFIER, max_shard_bytes=500_000)
    shards = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(len(open_checkpoint(path).shapes) == 1 or path.stat().st_size < 520_000 for path in shards)


def test_an_unknown_configuration_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown configuration 'piip'; choose from .*piip_det_tsb"):
        dry_run(MANIFESTS / f"{CHAT}.json", as_="piip")


@pytest.mark.parametrize("content", ["", "[]", '{"keys": {"a": 3}}', '{"a": [-1]}', "{}"])
def test_a_manifest_must_hold_names_and_shapes(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match="not a manifest"):
        read_manifest(tmp_path / "m.json")
