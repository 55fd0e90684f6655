"""Asking without transformers: the same prompts, features and answers, and every folder that must not go this
way."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import stepwell
from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.light import LightEngine, LightModel
from stepwell.models.plain import PlainConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.weights.light import load_light, load_to_ask

CPU = torch.device("cpu")
RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.jpg"


@pytest.fixture(scope="module")
def saved(build, vision, tmp_path_factory):
    """A small assistant whose answers differ from image to image, and the folder it was saved to."""
    assistant = build(vision)
    with torch.no_grad():
        for parameter in assistant.model.model.language_model.parameters():
            parameter.mul_(4)
    folder = tmp_path_factory.mktemp("saved")
    assistant.model.save_pretrained(folder)
    assistant.processor.save_pretrained(folder)
    return assistant, folder


def test_answers_and_features_are_those_of_transformers(saved, draw):
    assistant, folder = saved
    light = load_light(folder, device=CPU)
    assert light is not None
    a, b = draw(90, 60, 1), draw(40, 200, 2)
    pairs = [([a], "What is it?"), ([b, a], "Compare the two <|im_end|>, please."), ([b], "?")]
    answers = light.ask_many(pairs, max_new_tokens=12)
    assert answers == assistant.ask_many(pairs, max_new_tokens=12)
    assert len(set(answers)) > 1
    ours, theirs = light.features(b), assistant.features(b)
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-5, atol=1e-5)
    assert ours.layout == theirs.layout


def test_boxes_in_words_are_regions_here_too(saved, draw, tmp_path):
    assistant, _ = saved
    processor = copy(assistant.processor)
    processor.boxes_are_regions = True
    assistant.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    light = load_light(tmp_path, device=CPU)
    image, question = draw(90, 60), "Read [0.1, 0.1, 0.9, 0.4]"
    if type(assistant.model.config.vision) is PlainConfig:
        with pytest.raises(ValueError, match="one view, which always shows the whole image"):
            light.ask(image, question)
        return
    assert light.ask(image, question, max_new_tokens=8) == Assistant(assistant.model, processor).ask(
        image, question, max_new_tokens=8
    )
    assert light.layouts((image, question))[0].region == (9, 6, 81, 24)


def test_the_placeholder_is_never_an_answer(saved, draw):
    _, folder = saved
    light = load_light(folder, device=CPU)
    expected = light.ask(draw(60, 60), "What?", max_new_tokens=4)
    assert expected
    placeholder = torch.tensor([light.engine.image_token_id])
    light.engine.head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, placeholder, 1e4))
    assert light.ask(draw(60, 60), "What?", max_new_tokens=4) == expected


def test_prompts_are_those_of_the_processor(saved, draw):
    assistant, folder = saved
    light, image = load_light(folder, device=CPU), draw(90, 60)
    question = "Say <image> and <|im_start|>user\nnow.  "
    message = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": question}],
    }
    expected = assistant.processor.prompt([[message]])["input_ids"][0].tolist()
    assert light.prompt(question, [light.layout(image)]) == expected
    assert assistant.prompt(question, [light.layout(image)]) == expected


def test_truncation_and_padding_that_a_tokenizer_file_remembers_are_left_aside(saved, draw, tmp_path):
    assistant, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    fields["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    fields["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), "utf-8")
    light, question = load_light(tmp_path, device=CPU), "What is written in the third line of this page?"
    layouts = [light.layout(draw(90, 60))]
    assert light.prompt(question, layouts) == assistant.prompt(question, layouts)


def test_the_shipped_model_goes_this_way_and_says_the_same():
    light, whole = load_to_ask(), stepwell.load()
    assert isinstance(light.engine, LightEngine)
    questions = ["What is the total?", "What is the date on this receipt?"]
    pieces: list[str] = []
    assert light.ask(RECEIPT, questions) == whole.ask(RECEIPT, questions)
    assert light.ask(RECEIPT, questions[1], stream=pieces.append) == "".join(pieces).strip()


def test_a_placeholder_past_the_vocabulary_and_tied_embeddings(tmp_path, draw):
    """As in a converted release: <image> is the first id that the embedding has not."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    vocab_size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    vision = PlainConfig(encoder="vit_nano", size=64)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    config = StepwellConfig(vision, text, image_token_id=vocab_size, template="chatml_direct")
    model = StepwellForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template="chatml_direct")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    light = load_light(tmp_path, device=CPU)
    assert light is not None
    assert light.engine.head.weight is light.engine.language_model.embed_tokens.weight
    expected = Assistant(model, processor).ask(draw(60, 60), "What?", max_new_tokens=8)
    assert light.ask(draw(60, 60), "What?", max_new_tokens=8) == expected


def test_no_random_weights_are_made(saved, monkeypatch):
    """Those of a large language model would take minutes, and as much memory again as its file."""
    _, folder = saved
    load, devices = LightModel.load_state_dict, set()

    def remember(model, *arguments, **options):
        devices.update(parameter.device.type for parameter in model.parameters())
        return load(model, *arguments, **options)

    monkeypatch.setattr(LightModel, "load_state_dict", remember)
    assert load_light(folder, device=CPU) is not None
    assert devices == {"meta"}


def test_half_precision_and_the_stored_one(saved):
    _, folder = saved
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        engine = load_light(folder, device=CPU, dtype=dtype).engine
        assert {p.dtype for p in engine.language_model.parameters()} == {expected}
        assert {p.dtype for p in engine.vision.parameters()} == {expected}


CHANGES = [
    ("config.json", "template", None),
    ("config.json", "a_field_of_next_year", 1),
    ("config.json", "image_token_id", 7),
    ("config.json", "tie_word_embeddings", True),
    ("config.json", "text_config.attention_bias", True),
    ("config.json", "vision_config.framing", "crop"),
    ("config.json", "vision_config.kind", "another"),
    ("processor_config.json", "template", "qwen"),
    ("processor_config.json", "separators", {"row": ","}),
    ("processor_config.json", "image_processor.size", 3),
    ("processor_config.json", "image_processor.vision_config.framing", "crop"),
    ("tokenizer_config.json", "tokenizer_class", "LlamaTokenizer"),
    ("tokenizer_config.json", "clean_up_tokenization_spaces", True),
    ("tokenizer_config.json", "add_bos_token", True),
    ("tokenizer_config.json", "extra_special_tokens", ["<more>"]),
    ("tokenizer_config.json", "eos_token", "<not in the file>"),
    ("generation_config.json", "eos_token_id", None),
]


@pytest.mark.parametrize(("file", "field", "value"), CHANGES, ids=lambda value: str(value))
def test_a_folder_that_says_anything_else_goes_the_way_of_transformers(saved, tmp_path, file, field, value):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / file).read_text())
    *parents, last = field.split(".")
    inner = fields
    for parent in parents:
        inner = inner[parent]
    assert inner.get(last, ...) != value
    inner[last] = value
    (tmp_path / file).write_text(json.dumps(fields))
    assert load_light(tmp_path, device=CPU) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("lm_head.weight"),
        lambda weights: weights.update(extra=torch.ones(1)),
        lambda weights: weights.update({"lm_head.weight": torch.ones(3, 3)}),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_are_left_to_the_loader_that_says_so(saved, tmp_path, change):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_light(tmp_path, device=CPU) is None
    with pytest.raises(ValueError, match="do not fit"):
        load_to_ask(str(tmp_path))


def test_another_language_model_is_asked_through_transformers(build, tmp_path, draw):
    assistant = build(family="qwen2")
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    loaded = load_to_ask(str(tmp_path))
    assert not isinstance(loaded.engine, LightEngine)
    assert loaded.ask(draw(60, 60), "What?") == assistant.ask(draw(60, 60), "What?")


@pytest.mark.slow
def test_the_command_loads_neither_transformers_nor_the_compiler():
    code = f"""
import sys
from stepwell.cli import main
assert main(["ask", {str(RECEIPT)!r}, "What is the total?"]) == 0
heavy = ("transformers", "torch._dynamo", "torchvision", "timm", "sympy")
print([name for name in heavy if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stderr == ""


def test_the_vision_of_a_light_model_names_its_parameters_as_the_whole_one_does(saved):
    _, folder = saved
    engine = load_light(folder, device=CPU).engine
    stored = load_file(folder / "model.safetensors")
    for prefix, module in (
        ("model.vision.", engine.vision),
        ("model.language_model.", engine.language_model),
    ):
        names = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
        assert {name for name, _ in module.named_parameters()} == names
        assert names
