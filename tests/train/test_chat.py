"""What a chat starts from: a whole model, or parts from wherever they are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from stepwell.folders import ModelError
from stepwell.language.labels import IGNORE
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.chat import (
    ChatTask,
    _config,
    _folder,
    language_loss,
    longest_sample,
    token_accuracy,
)
from stepwell.train.dry_run import dry_run
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task

ENCODER = {"dim": 32, "depth": 2, "num_heads": 4, "norm_eps": 1e-12, "class_token": True, "class_slot": True}
VISION = {
    "kind": "plain",
    "encoder": "vit_nano",
    "size": 64,
    "select_layer": -1,
    "projector": "linear",
    "arguments": {**ENCODER, "position": "table", "position_grid": [4, 4]},
}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model with its tokenizer, and an encoder, as transformers saves them."""
    language, encoder = (tmp_path_factory.mktemp(name) for name in ("language", "encoder"))
    tokenizer = build_reader_tokenizer()
    tokenizer.save_pretrained(language)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT))
    llama.save_pretrained(language)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    vit = ViTModel(ViTConfig(hidden_size=32, intermediate_size=128, **sizes))
    vit.save_pretrained(encoder)
    return SimpleNamespace(language=language, encoder=encoder, llama=llama, vit=vit)


@pytest.fixture
def started(folders, tmp_path, monkeypatch):
    """started(part=source, ...) -> the module of a chat whose other parts are random."""
    monkeypatch.chdir(tmp_path)  # where it came from is written into runs/

    def module_of(**parts):
        model = {"vision": VISION, "parts": parts, "tokenizer": str(folders.language), "template": "qwen"}
        if "language" not in parts:
            model["text"] = {"model_type": "llama", **TEXT}
        (tmp_path / "talk.json").write_text("[]")
        data = [{"kind": "conversations", "path": str(tmp_path / "talk.json")}]
        fields = {"task": "chat", "name": "mine", "model": model}
        fields["stages"] = [{"name": "one", "steps": 1, "data": data}]
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(fields))))
        recipe = load_recipe(tmp_path / "mine.yaml")
        torch.manual_seed(1)
        return ChatTask(recipe, recipe.stages[0]).build()

    return module_of


def test_a_language_model_and_an_encoder_come_from_their_folders(folders, started):
    module = started(language=str(folders.language), **{"vision.branches.0": str(folders.encoder)})
    ids, image = torch.tensor([[5, 6, 7]]), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = super(type(module), module).forward(input_ids=ids).logits
        torch.testing.assert_close(logits, folders.llama(ids).logits)
        seen = module.model.vision.branches[0].eval()(image).tokens
        theirs = folders.vit.eval()(image, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen, theirs[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["projector", "vision.branches.0", "vision.branches", "language.lm_head"])
def test_any_part_comes_from_a_file_of_ours(started, tmp_path, part):
    prefix = {"projector": "model.vision.projector", "language.lm_head": "lm_head"}.get(part, f"model.{part}")
    weights = {name: value + 1 for name, value in started().get_submodule(prefix).state_dict().items()}
    save_file(weights, tmp_path / "part.safetensors")
    module = started(**{part: str(tmp_path / "part.safetensors")})
    for name, value in module.get_submodule(prefix).state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ("adapter", r"parts\.adapter: the model has no such part; its parts are language, .*vision"),
        ("vision.branches.7", r"parts\.vision\.branches\.7: the model has no such part"),
        (
            "projector",
            r"parts\.projector: .*part\.safetensors does not fit: 2 missing .*, 1 unknown \(other\)",
        ),
    ],
)
def test_a_part_that_there_is_not_and_one_that_does_not_fit_are_refused_in_a_line(
    started, tmp_path, part, complaint
):
    save_file({"other": torch.ones(1)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=complaint) as refusal:
        started(**{part: str(tmp_path / "part.safetensors")})
    assert "\n" not in str(refusal.value)


def test_a_start_that_answers_no_questions_is_refused(folders):
    with pytest.raises(
        ModelError, match=r"model\.start: .* holds a 'llama' model, which answers no questions"
    ):
        _folder(str(folders.language))


def test_accuracy_is_the_share_of_supervised_tokens_and_of_evaluation_alone(started):
    labels = torch.tensor([[IGNORE, 3, IGNORE, 5, 7], [IGNORE, IGNORE, IGNORE, 1, IGNORE]])
    said = torch.tensor([[3, 9, 7], [4, 1, 4]])  # behind positions 0, 2 and 3, which some row supervises
    outputs = SimpleNamespace(logits=F.one_hot(said, 10).float())
    assert token_accuracy(outputs, labels) == 3 / 4  # 3, 7 and 1 are right; 5 is not
    assert token_accuracy(SimpleNamespace(logits=outputs.logits[:, :0]), labels.clamp(max=IGNORE)) == 0
    module, ids = started(), torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    assert module.train()(**batch).keys() == {"language"}
    assert module.eval()(**batch).keys() == {"language", "accuracy"}
    assert ChatTask.counts(None, batch)["accuracy"] == 3


def test_the_loss_of_answers_is_taken_in_full_precision_of_the_supervised_alone():
    logits = torch.randn(2, 6, 40).mul(4).bfloat16()
    labels = torch.tensor([[IGNORE, 3, IGNORE, 5, 7, IGNORE], [IGNORE, IGNORE, IGNORE, 1, IGNORE, IGNORE]])
    loss, _ = language_loss(
        lambda logits_to_keep, use_cache: SimpleNamespace(logits=logits[:, logits_to_keep]), labels
    )
    right = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), right, atol=1e-6, rtol=1e-6)


def test_a_tokenizer_of_another_language_model_is_refused():
    tokenizer = build_reader_tokenizer()
    text = {"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)}
    model = SimpleNamespace(text=text, vision=VISION, template="qwen", parts={}, revisions={})
    assert _config(model, tokenizer).text_config.vocab_size == len(tokenizer)
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match=r"ids up to \d+, the language model an embedding of \d+; name the"):
        _config(model, tokenizer)


class FewTokens:
    """As of a released model, whose tokenizer was given `<image>` last."""

    pad_token_id = eos_token_id = bos_token_id = None

    def __len__(self):
        return 6

    def get_vocab(self):
        return {"a": 4, "<image>": 5}

    def convert_tokens_to_ids(self, token):
        return self.get_vocab()[token]


def test_the_token_of_an_image_may_lie_past_the_embedding():
    text = {"model_type": "llama", **TEXT, "vocab_size": 5}
    model = SimpleNamespace(text=text, vision=VISION, template="qwen", parts={}, revisions={})
    assert _config(model, FewTokens()).image_token_id == 5


def sliced_task(folders, tmp_path, vision, **data):
    """The task of a chat about one image of 40 x 30 pixels, and the entry of its data."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "talk.json").write_text(json.dumps([{"image": "x.png", "conversations": turns}]))
    entry = {"kind": "conversations", "path": str(tmp_path / "talk.json"), **data}
    model = {"vision": vision, "text": {"model_type": "llama", **TEXT}, "tokenizer": str(folders.language)}
    fields = {"name": "mine", "model": {**model, "template": "qwen"}}
    fields["stages"] = [{"name": "one", "steps": 1, "data": [entry]}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(fields))))
    recipe = load_recipe(tmp_path / "mine.yaml")
    return ChatTask(recipe, recipe.stages[0]), recipe.stages[0].data[0]


SLICED = {"kind": "uhd_v1", "encoder": "vit_nano", "size": 64, "max_slices": 9, "windows": {"query_sets": 1}}


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ({}, (30, 40)),
        ({"long_side": 100}, (75, 100)),
        ({"sliced": 1.0}, (135, 181)),  # 6 * 64 * 64 pixels in the aspect 4:3
        ({"sliced": 1.0, "slices": 4}, (110, 147)),
        ({"long_side": {"X.PNG": 80}, "sliced": 1.0}, (60, 80)),
        ({"long_side": {"y.png": 80, "/x/": 70}, "sliced": 1.0}, (135, 181)),
        ({"long_side": {"y.png": 80, "x.": 60}}, (45, 60)),
    ],
)
def test_images_are_resized_as_the_data_says_before_they_are_sliced(folders, tmp_path, data, size):
    task, entry = sliced_task(folders, tmp_path, SLICED, **data)
    example = task.prepare(task.source(entry)[0])
    assert example.images["image_sizes"].tolist() == [list(size)]


def test_other_places_of_every_source_are_resized(folders, tmp_path):
    task, _ = sliced_task(folders, tmp_path, SLICED, sliced=0.5)
    entry = json.loads((tmp_path / "talk.json").read_text()) * 200
    fields = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    data = fields["stages"][0].pop("data") * 2
    for i, each in enumerate(data):
        (tmp_path / f"{i}.json").write_text(json.dumps(entry))
        data[i] = {**each, "path": str(tmp_path / f"{i}.json")}
    fields["stages"][0] |= {"data": data, "validation": [{**data[0], "weight": 2.0}]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(fields))
    recipe = load_recipe(tmp_path / "two.yaml")
    stage = recipe.stages[0]
    task = ChatTask(recipe, stage)
    chosen = [
        [bool(source[i].resize) for i in range(200)]
        for source in map(task.source, [*stage.data, *stage.validation, stage.data[1]])
    ]
    assert chosen[1] == chosen[3]
    assert all(70 < sum(each) < 130 for each in chosen)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 70 < sum(a != b for a, b in zip(chosen[one], chosen[other], strict=True)) < 130


def test_an_image_that_gives_as_many_slices_stays_as_it_is(folders, tmp_path):
    task, entry = sliced_task(folders, tmp_path, SLICED, sliced=1.0)
    resize = task.source(entry)[0].resize
    geometry = task.collator.processor.image_processor.geometry
    wide = (64 * 2 + 2, 64 * 3 + 2)
    assert geometry.layout(wide).tiles == (2, 3)
    assert resize(wide) == wide


def test_slices_are_refused_where_there_are_none(folders, tmp_path):
    task, entry = sliced_task(folders, tmp_path, VISION, sliced=0.5)
    with pytest.raises(ValueError, match=r"data\.sliced: a 'plain' system has no slices"):
        task.source(entry)
    with pytest.raises(ValueError, match="give either long_side or sliced"):
        sliced_task(folders, tmp_path, SLICED, sliced=0.5, long_side=9)


@pytest.mark.parametrize(
    ("turns", "wanted", "length"),
    [("together", None, 50), ("together", 20, 20), ("together", 60, 50), ("apart", None, 8192)],
)
def test_a_conversation_is_no_longer_than_the_language_model_has_positions(turns, wanted, length):
    stage = SimpleNamespace(turns=turns, max_length=8192 if wanted is None else wanted)
    assert longest_sample(stage, LlamaConfig(max_position_embeddings=50)) == length
    assert longest_sample(stage, GPT2Config(n_positions=50)) == length


def test_the_collator_and_a_dry_run_know_the_longest_sample(tmp_path):
    recipe = ["stages.answer.turns=together", "model.text.max_position_embeddings=300", f"output={tmp_path}"]
    settings = load_recipe("reader_smoke", recipe)
    task = find_task("reader")(settings, settings.stages[-1])
    assert task.collator.max_length == 300
    assert "a sample has at most 300 tokens" in dry_run("reader_smoke", recipe)
