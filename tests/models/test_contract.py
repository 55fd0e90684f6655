"""What transformers' own classes promise, held against each of ours: outputs, losses, keywords, sizes, folders."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    Trainer,
    TrainingArguments,
    pipeline,
)

from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.assistant import (
    CACHE,
    StepwellForConditionalGeneration,
    StepwellModel,
)
from stepwell.models.config import StepwellConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.processor import StepwellProcessor
from stepwell.models.pyramid import BranchConfig
from stepwell.models.register import register

BRANCHES = tuple(
    BranchConfig(
        encoder="vit_nano",
        size=size,
        interactions=((0, 0), (1, 1)),
        arguments={"dim": dim, "depth": 2, "num_heads": 2},
    )
    for size, dim in ((32, 32), (64, 16))
)
FEW = InteractionConfig(num_heads=2, drop_path=0.0)
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
KINDS = ("model", "assistant", "backbone", "classifier")


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def classifier_of(num_labels=3, **fields):
    torch.manual_seed(0)
    settings = ClassifierSettings(branches=BRANCHES, interaction=FEW)
    return PyramidForImageClassification(
        PyramidClassifierConfig(settings, num_labels=num_labels, **fields)
    ).eval()


@pytest.fixture
def models(build, draw):
    """By kind -> (a model in evaluation, its inputs)."""
    assistant = build()
    inputs = dict(asking(assistant, draw))
    torch.manual_seed(0)
    backbone = PyramidBackbone(PyramidBackboneConfig(DenseSettings(branches=BRANCHES, interaction=FEW)))
    return {
        "model": (assistant.model.model, inputs),
        "assistant": (assistant.model, inputs),
        "backbone": (backbone.eval(), {"pixel_values": PIXELS}),
        "classifier": (classifier_of(), {"pixel_values": PIXELS}),
    }


def asking(assistant, draw, text="<image> what is it?", **options):
    return assistant.processor(images=draw(90, 60), text=text, return_tensors="pt", **options)


def chat(*images, question="Why?", answer=None):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    answers = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [{"role": "user", "content": content}, *answers]


# ---- outputs


ORDER = {
    "model": ["last_hidden_state", CACHE, "image_hidden_states"],
    "assistant": ["loss", "logits", CACHE, "image_hidden_states", "last_hidden_state"],
    "backbone": ["feature_maps"],
    "classifier": ["loss", "logits"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_stand_in_transformers_order_as_attributes_keys_and_tuple(models, kind):
    model, inputs = models[kind]
    if kind in ("assistant", "classifier"):
        inputs = {**inputs, "labels": inputs.get("input_ids", torch.tensor([0, 2]))}
    out = model(**inputs)
    assert list(out.keys()) == ORDER[kind]
    for i, name in enumerate(ORDER[kind]):
        assert out[i] is out[name] is getattr(out, name)
    given = model(**inputs, return_dict=False)
    model.config.return_dict = False
    configured = model(**inputs)
    model.config.return_dict = True
    for values in (given, configured):
        assert type(values) is tuple
        assert len(values) == len(ORDER[kind])
        first = out[0][0] if kind == "backbone" else out[0]
        assert torch.equal(values[0][0] if kind == "backbone" else values[0], first)


def test_an_assistants_hidden_states_and_attentions_are_the_language_models(build, draw):
    model = build().model
    model.set_attn_implementation("eager")
    inputs = asking(build(), draw)
    layers, length = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == layers + 1
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert [a.shape[-2:] for a in out.attentions] == [(length, length)] * layers
    assert model(**inputs).hidden_states is None


def test_a_backbones_hidden_states_are_the_maps_of_all_stages(models):
    whole, inputs = models["backbone"]
    model = PyramidBackbone(PyramidBackboneConfig(whole.config.settings, out_features=["stage2"])).eval()
    model.load_state_dict(whole.state_dict())
    out, maps = model(**inputs, output_hidden_states=True), whole(**inputs).feature_maps
    assert all(map(torch.equal, out.hidden_states, maps))
    assert len(out.hidden_states) == len(model.stage_names)
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == len(maps)


# ---- losses


@pytest.mark.parametrize(
    ("num_labels", "problem", "labels", "expected", "inferred"),
    [
        (3, None, [0, 2], F.cross_entropy, "single_label_classification"),
        (3, "single_label_classification", [[2], [-100]], F.cross_entropy, "single_label_classification"),
        (3, None, [[0.0, 1, 1], [1, 0, 0]], F.binary_cross_entropy_with_logits, "multi_label_classification"),
        (3, "multi_label_classification", [[0, 1, 1], [1, 0, 0]], F.binary_cross_entropy_with_logits, None),
        (1, None, [0.5, -2.0], F.mse_loss, "regression"),
        (1, None, [3, 4], F.mse_loss, "regression"),
        (3, "regression", [[0.0, 1, 2], [1, 0, 3]], F.mse_loss, "regression"),
    ],
)
def test_the_loss_of_a_classifier_is_that_of_its_problem(num_labels, problem, labels, expected, inferred):
    model, labels = classifier_of(num_labels, problem_type=problem), torch.tensor(labels)
    out = model(PIXELS, labels=labels)
    if expected is F.cross_entropy:
        loss = expected(out.logits, labels.flatten())
    else:
        loss = expected(out.logits, labels.reshape(out.logits.shape).float())
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward()
    assert model.config.problem_type == (inferred or problem)


def test_losses_of_classes_are_summed_and_divided_where_a_count_is_given():
    model, labels = classifier_of(), torch.tensor([0, 2])
    out = model(PIXELS, labels=labels, num_items_in_batch=8)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels, reduction="sum") / 8)


@pytest.mark.parametrize(
    ("problem", "labels", "words"),
    [
        (None, torch.tensor([0, 3]), "classes 0 to 2, got 3"),
        (None, torch.tensor([0, -1]), "classes 0 to 2, got -1"),
        (None, torch.tensor([0, 1, 2]), r"\(2,\) whole numbers, got \(3,\)"),
        (None, torch.zeros(2, 3).long(), r"\(2,\) whole numbers, got \(2, 3\) .*problem_type"),
        ("single_label_classification", torch.tensor([0.0, 1.0]), "whole numbers, got .*float32"),
        ("multi_label_classification", torch.zeros(2, 4), r"\(2, 3\), one an output, got \(2, 4\)"),
        ("regression", torch.zeros(2), r"\(2, 3\), one an output, got \(2,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_words(problem, labels, words):
    with pytest.raises(ValueError, match=words):
        classifier_of(problem_type=problem)(PIXELS, labels=labels)


@pytest.fixture(params=["inside", "past"])
def released(request, build, tokenizer):
    """An assistant whose placeholder is a word of the vocabulary, or, as in converted releases, is not."""
    assistant = build()
    if request.param == "past":
        image_token_id = assistant.processor.image_token_id
        assert image_token_id == 0 or image_token_id < len(tokenizer)
        model = assistant.model
        model.resize_token_embeddings(len(tokenizer) + 8)
        config = copy.deepcopy(model.config)
        config.image_token_id = config.text_config.vocab_size = len(tokenizer) + 8
        past = StepwellForConditionalGeneration(config).eval()
        past.load_state_dict(model.state_dict())
        past.generation_config = model.generation_config
        return past, config.image_token_id
    return assistant.model.eval(), assistant.processor.image_token_id


@pytest.fixture
def prompt(released, assistant, draw):
    """The inputs of two rows, one of two images, with the placeholder of `released`; padded on the left."""
    rows = [chat(draw(90, 60, 1)), chat(draw(40, 80, 2), draw(64, 64, 3), question="Which of the two?")]
    inputs = dict(assistant.processor.prompt(rows))
    is_placeholder = inputs["input_ids"] == assistant.processor.image_token_id
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(is_placeholder, released[1])}


def test_placeholders_among_the_labels_are_no_targets(released, prompt):
    model, image_token_id = released
    ids = prompt["input_ids"]
    labels = ids.masked_fill(prompt["attention_mask"] == 0, -100)
    out = model(**prompt, labels=labels)
    wanted = labels.masked_fill(ids == image_token_id, -100)[:, 1:].flatten()
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100))
    again = model(**prompt, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum())
    torch.testing.assert_close(again.loss, out.loss)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**prompt, labels=labels, shift_labels=shifted).loss, out.loss)
    masked = model(**prompt, labels=labels.masked_fill(ids == image_token_id, -100), num_items_in_batch=7)
    torch.testing.assert_close(masked.loss, out.loss * (wanted != -100).sum() / 7)
