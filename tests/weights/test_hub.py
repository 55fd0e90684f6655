"""Models by their names on the hub: from its cache, at a revision, and never with code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_releases import shrink, small_state
from transformers import AutoModelForCausalLM, LlamaConfig

import stepwell
from stepwell import cli
from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.pretrained import load_encoder_weights
from stepwell.folders import HubError, ModelError, commit_of
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.plain import PlainConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.chat import ChatTask
from stepwell.train.chat_recipe import ChatModel
from stepwell.train.run import train

OLD, NEW = "0" * 39 + "1", "f" * 40
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, {commit: folder}, {branch or tag: commit}) lays a repository into the cache, as the hub's own
    client does; main is the last commit.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def lay(name, commits, refs=()):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        for commit, folder in commits.items():
            shutil.copytree(folder, place / "snapshots" / commit)
        for ref, target in {"main": list(commits)[-1], **dict(refs)}.items():
            (place / "refs" / ref).write_text(target)
        return place / "snapshots"

    return lay


def build():
    tokenizer = build_reader_tokenizer()
    vision = PlainConfig(encoder="vit_nano", size=64)
    config = StepwellConfig(
        vision,
        LlamaConfig(vocab_size=len(tokenizer), **LANGUAGE),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        template="chatml_direct",
    )
    processor = StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template="chatml_direct")
    return StepwellForConditionalGeneration(config), processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of ours that differ in a number."""
    made = {}
    for seed, commit in enumerate((OLD, NEW)):
        torch.manual_seed(seed)
        made[commit] = tmp_path_factory.mktemp(f"model{seed}")
        for part in build():
            part.save_pretrained(made[commit])
    return made


def weights_of(folder):
    return load_file(folder / "model.safetensors")["lm_head.weight"]


def test_a_name_loads_the_commit_that_is_asked_for_and_says_which_it_was(hub, folders):
    hub("owner/model", folders, {"v1": OLD})
    for revision, commit in ((None, NEW), ("v1", OLD), ("main", NEW), (OLD, OLD)):
        assistant = stepwell.load("owner/model", revision=revision)
        assert torch.equal(assistant.model.lm_head.weight.cpu(), weights_of(folders[commit]))
        assert assistant.commit == assistant.model.config._commit_hash == commit
        assert commit in repr(assistant)
    with pytest.raises(HubError, match="owner/model at revision v2 is not on this machine"):
        stepwell.load("owner/model", revision="v2")


def test_the_command_line_takes_a_revision_and_tells_the_commit(hub, folders, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    hub("owner/model", folders, {"v1": OLD})
    arguments = ["ask", str(tmp_path / "a.png"), "?", "--model", "owner/model", "--max-new-tokens", "1"]
    assert cli.main([*arguments, "--revision", "v1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["commit"]) == ("owner/model", OLD)
    assert cli.main([*arguments, "--revision", "v2"]) == 2
    assert "at revision v2" in capsys.readouterr().err


def test_what_is_on_this_machine_has_no_revision(folders, tmp_path):
    assert commit_of(folders[OLD]) is None
    assert stepwell.load(folders[OLD]).commit is None
    model, _ = build()
    for call in (
        lambda: stepwell.load(folders[OLD], revision="v1"),
        lambda: stepwell.load(revision="v1"),
        lambda: stepwell.load_parts(model, {"language": str(folders[OLD])}, revisions={"language": "v1"}),
        lambda: build_encoder("vit_nano", weights=folders[OLD], revision="v1"),
        lambda: ChatTask.configuration(recipe(start="reader_tiny", revision="v1")),
    ):
        with pytest.raises(ValueError, match=r"revision v1: .* is on this machine, as one version$"):
            call()


class recipe:
    """As much of a recipe as tells its model."""

    def __init__(self, **model):
        self.model = ChatModel(**model)


def test_a_recipe_starts_from_a_revision(hub, folders):
    hub("owner/model", folders, {"v1": OLD})
    changed = json.loads((folders[OLD] / "config.json").read_text()) | {"template": "vicuna_v1"}
    place = hub("owner/changed", folders, {"v1": OLD})
    (place / OLD / "config.json").write_text(json.dumps(changed))
    templates = [
        ChatTask.configuration(recipe(start="owner/changed", revision=revision)).template
        for revision in (None, "v1")
    ]
    assert templates == ["chatml_direct", "vicuna_v1"]
    with pytest.raises(ValueError, match="revision is of a start"):
        ChatModel(revision="v1", vision={"kind": "plain", "encoder": "vit_nano", "size": 64}, text={})


def test_parts_start_from_a_revision_and_their_reports_say_which_commit(hub, tmp_path):
    languages, encoders = {}, {}
    for seed, commit in enumerate((OLD, NEW)):
        torch.manual_seed(10 + seed)
        languages[commit], encoders[commit] = tmp_path / f"language{seed}", tmp_path / f"encoder{seed}"
        text = LlamaConfig(vocab_size=len(build_reader_tokenizer()), **LANGUAGE)
        AutoModelForCausalLM.from_config(text).save_pretrained(languages[commit])
        encoders[commit].mkdir()
        save_file(build_encoder("vit_nano").state_dict(), encoders[commit] / "model.safetensors")
    hub("owner/language", languages)
    hub("owner/encoder", encoders)
    model, _ = build()
    sources = {"language": "owner/language", "vision.branches.0": "owner/encoder"}
    for revisions, commits in (({}, {NEW}), (dict.fromkeys(sources, OLD), {OLD})):
        reports = stepwell.load_parts(model, sources, revisions=revisions)
        assert {report.commit for report in reports.values()} == commits
        for report in reports.values():
            assert report.json()["commit"] in report.text()
        (commit,) = commits
        assert torch.equal(model.lm_head.weight, weights_of(languages[commit]))
    with pytest.raises(ValueError, match=r"revisions\.vision: weights name no such part"):
        stepwell.load_parts(model, sources, revisions={"vision": OLD})
    report = load_encoder_weights(build_encoder("vit_nano"), "owner/encoder", revision=OLD)
    assert report.commit == OLD


def test_a_release_is_converted_once_for_a_commit_and_its_folder_says_which(hub, tmp_path, monkeypatch):
    name = "piip_cls_sbl_320_160_96"
    shrink(name, monkeypatch)
    published = stepwell.weights.load.find_published(name)
    for commit, factor in ((OLD, 1), (NEW, 2)):
        (tmp_path / commit / published.file).parent.mkdir(parents=True)
        state = {key: factor * tensor for key, tensor in small_state(name).items()}
        torch.save(state, tmp_path / commit / published.file)
    hub(published.repository, {commit: tmp_path / commit for commit in (OLD, NEW)}, {"v1": OLD})
    newest, old, again = (stepwell.load(name, revision=revision) for revision in (None, "v1", OLD))
    assert [model.config._commit_hash for model in (newest, old, again)] == [NEW, OLD, OLD]
    first = next(iter(old.state_dict()))
    assert torch.equal(newest.state_dict()[first], 2 * old.state_dict()[first])
    converted = sorted(path.name for path in (tmp_path / "home" / "stepwell").iterdir())
    assert converted == [name, f"{name}--{OLD}"]
    report = json.loads((tmp_path / "home" / "stepwell" / name / "conversion.json").read_text())
    assert report["commit"] == NEW


CODE = {"AutoModel": "modeling_theirs.Model"}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda fields: fields.update(auto_map=CODE)),
        ("config.json", lambda fields: fields["text_config"].update(auto_map=CODE)),
        ("config.json", lambda fields: fields.update(more=[[{"auto_map": CODE}]])),
        ("config.json", lambda fields: fields["text_config"].update(attn_implementation="owner/kernel")),
        ("tokenizer_config.json", lambda fields: fields.update(auto_map={"AutoTokenizer": ["a.B", None]})),
        ("processor_config.json", lambda fields: fields.update(auto_map={"AutoProcessor": "a.B"})),
        ("processor_config.json", lambda fields: fields["image_processor"].update(auto_map=CODE)),
        ("preprocessor_config.json", lambda fields: fields.update(auto_map=CODE)),
        ("generation_config.json", lambda fields: fields.update(auto_map=CODE)),
    ],
)
def test_a_folder_that_asks_for_code_is_refused_and_nobody_is_asked(
    file, change, hub, folders, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise AssertionError("somebody was asked, or code was looked for")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", refuse)
    place = hub("owner/model", folders) / NEW
    fields = json.loads((place / file).read_text()) if (place / file).is_file() else {}
    change(fields)
    (place / file).write_text(json.dumps(fields))
    (place / "modeling_theirs.py").write_text("raise SystemExit('this was run')")
    for model in (str(place), "owner/model"):
        with pytest.raises(ModelError, match=rf"^[^\n]*{file} asks for code of its own[^\n]*$"):
            stepwell.load(model)
        with pytest.raises(ModelError, match="asks for code of its own"):
            ChatTask.configuration(recipe(start=model))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert cli.main(["ask", str(tmp_path / "a.png"), "?", "--model", str(place)]) == 2
    assert "asks for code of its own" in capsys.readouterr().err


def test_settings_nested_without_end_are_refused_in_one_line(folders, tmp_path):
    folder = shutil.copytree(folders[OLD], tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ModelError, match=r"tokenizer_config.json cannot be read: not JSON"):
        stepwell.load(folder)


def test_an_adapter_is_no_model(folders, tmp_path):
    """transformers would load the model that it names, from wherever."""
    folder = shutil.copytree(folders[OLD], tmp_path / "model")
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "owner/other", "peft_type": "LORA"}'
    )
    with pytest.raises(ModelError, match="holds an adapter"):
        stepwell.load(folder)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_download_that_lacks_a_file_is_refused(lost, hub, folders):
    place = hub("owner/model", folders) / NEW
    (place / lost).unlink()
    with pytest.raises(ModelError, match=r"^[^\n]*$"):
        stepwell.load("owner/model")


def test_shards_that_are_missing_or_of_another_model_are_refused(hub, folders, tmp_path):
    model, processor = build()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    place = hub("owner/model", {NEW: tmp_path / "sharded"}) / NEW
    last = max(place.glob("model-*.safetensors"))
    assert torch.equal(stepwell.load("owner/model").model.lm_head.weight.cpu(), model.lm_head.weight)
    last.unlink()
    with pytest.raises(ValueError, match="shards are missing"):
        stepwell.load("owner/model")
    save_file({"other.weight": torch.ones(2)}, last, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit|index"):
        stepwell.load("owner/model")


def test_a_trained_folder_says_which_commits_it_started_from(hub, folders, tmp_path):
    hub("owner/model", folders, {"v1": OLD})
    tokenizer = build()[1].tokenizer
    llama = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **LANGUAGE))
    for part in (llama, tokenizer):
        part.save_pretrained(tmp_path / "llama")
    hub("owner/llama", {OLD: tmp_path / "llama", NEW: tmp_path / "llama"}, {"v1": OLD})
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    data = [{"kind": "conversations", "path": str(tmp_path / "a.json")}]
    stages = [{"name": name, "steps": 1, "batch": 1, "train": ["projector"], "data": data} for name in "ab"]
    parts = {
        "vision": {"kind": "plain", "encoder": "vit_nano", "size": 64},
        "parts": {"language": "owner/llama"},
        "revisions": {"language": "v1"},
        "template": "chatml_direct",
    }
    expected = {"language": {"from": "owner/llama", "commit": OLD}}
    for model in (parts, {"start": "owner/model", "revision": "v1"}):
        recipe = {"name": "a", "model": model, "stages": stages, "bf16": False, "workers": 0}
        (tmp_path / "a.yaml").write_text(json.dumps({**recipe, "output": str(tmp_path / str(len(model)))}))
        folder = train(tmp_path / "a.yaml")
        assert json.loads((folder / "origin.json").read_text()) == expected
        assert isinstance(stepwell.load(folder).ask(tmp_path / "a.png", "?", max_new_tokens=1), str)
        expected = {"start": {"from": "owner/model", "commit": OLD}}
