"""What transformers' own classes promise, held against each of ours: outputs, losses, keywords, folders."""

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
    LogitsProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.generation.logits_process import (
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.assistant import (
    CACHE,
    StepwellForConditionalGeneration,
    StepwellModel,
)
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.plain import PlainConfig
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
PLAIN = PlainConfig(encoder="vit_nano", size=32)
FEW = InteractionConfig(num_heads=2, drop_path=0.0)
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
STATIC = {"cache_implementation": "static", "disable_compile": True}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
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
    assistant = build(PLAIN)
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
    model = build(PLAIN).model
    model.set_attn_implementation("eager")
    inputs = asking(build(PLAIN), draw)
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
        (3, None, torch.tensor([0, 2]).int(), F.cross_entropy, "single_label_classification"),
        (3, "single_label_classification", [[2], [-100]], F.cross_entropy, "single_label_classification"),
        (3, None, [[0.0, 1, 1], [1, 0, 0]], F.binary_cross_entropy_with_logits, "multi_label_classification"),
        (3, "multi_label_classification", [[0, 1, 1], [1, 0, 0]], F.binary_cross_entropy_with_logits, None),
        (1, None, [0.5, -2.0], F.mse_loss, "regression"),
        (1, None, [3, 4], F.mse_loss, "regression"),
        (3, "regression", [[0.0, 1, 2], [1, 0, 3]], F.mse_loss, "regression"),
    ],
)
def test_the_loss_of_a_classifier_is_that_of_its_problem(num_labels, problem, labels, expected, inferred):
    model, labels = classifier_of(num_labels, problem_type=problem), torch.as_tensor(labels)
    out = model(PIXELS, labels=labels)
    if expected is F.cross_entropy:
        loss = expected(out.logits, labels.flatten().long())
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


@pytest.fixture(scope="module", params=["inside", "past"])
def released(request, build):
    """An assistant whose placeholder is a word of the vocabulary, or, as in converted releases, is not."""
    assistant = build(PLAIN)
    if request.param == "past":
        model = assistant.model
        config = copy.deepcopy(model.config)
        config.image_token_id = config.text_config.vocab_size
        past = StepwellForConditionalGeneration(config).eval()
        past.generation_config = model.generation_config
        assistant.model = past
    torch.manual_seed(0)
    for parameter in assistant.model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # answers that say more than one word
    return assistant.model.eval(), assistant.model.config.image_token_id


@pytest.fixture(scope="module")
def prompt(released, build, draw):
    """The inputs of two rows, one of two images, with the placeholder of `released`; padded on the left."""
    processor = build(PLAIN).processor
    rows = [chat(draw(90, 60, 1)), chat(draw(40, 80, 2), draw(64, 64, 3), question="Which of the two?")]
    inputs = dict(processor.prompt(rows))
    is_placeholder = inputs["input_ids"] == processor.image_token_id
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(is_placeholder, released[1])}


def test_placeholders_among_the_labels_are_no_targets(released, prompt):
    model, image_token_id = released
    ids = prompt["input_ids"]
    labels = ids.masked_fill(prompt["attention_mask"] == 0, -100)
    out = model(**prompt, labels=labels)
    wanted = labels.masked_fill(ids == image_token_id, -100)[:, 1:].flatten()
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100)
    )
    again = model(**prompt, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum())
    torch.testing.assert_close(again.loss, out.loss)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**prompt, labels=labels, shift_labels=shifted).loss, out.loss)
    masked = model(**prompt, labels=labels.masked_fill(ids == image_token_id, -100), num_items_in_batch=7)
    torch.testing.assert_close(masked.loss, out.loss * (wanted != -100).sum() / 7)


# ---- generation


class Frequencies(LogitsProcessor):
    """A penalty for every time that a word stands in the text, of somebody's own."""

    def __call__(self, input_ids, scores):
        return scores - torch.zeros_like(scores).scatter_add(1, input_ids, torch.full(input_ids.shape, 2.0))


def answer(model, prompt, **options):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :].tolist()


def answer_by_hand(model, prompt, processor):
    """Greedily; the processor sees the text with its placeholders left out."""
    ids, never = prompt["input_ids"], [model.config.image_token_id, model.generation_config.eos_token_id]
    for _ in range(6):
        scores = model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[:, -1]
        scores[:, [token for token in never if token < scores.shape[1]]] = -torch.inf
        words = ids[ids != model.config.image_token_id][None]
        ids = torch.cat([ids, processor(words, scores).argmax(-1, keepdim=True)], 1)
    return ids[:, prompt["input_ids"].shape[1] :].tolist()


def row_of(prompt, model, row):
    """One row of two without its padding and the other's images."""
    count = (1, 2)[row]
    sizes = prompt["image_sizes"].split((1, 2))[row]
    pixels = prompt["pixel_values"].split(
        [
            sum(layout.num_pixels for layout in model.model.layouts(s))
            for s in prompt["image_sizes"].split((1, 2))
        ]
    )[row]
    assert len(sizes) == count
    ids = prompt["input_ids"][row][prompt["attention_mask"][row].bool()][None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


PENALTIES = [
    ({"repetition_penalty": 1.7}, lambda text: RepetitionPenaltyLogitsProcessor(1.7)),
    ({"encoder_repetition_penalty": 4.0}, lambda text: EncoderRepetitionPenaltyLogitsProcessor(4.0, text)),
    ({"no_repeat_ngram_size": 1}, lambda text: NoRepeatNGramLogitsProcessor(1)),
    (
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.7)]},
        lambda text: RepetitionPenaltyLogitsProcessor(1.7),
    ),
    ({"logits_processor": [Frequencies()]}, lambda text: Frequencies()),
]


@pytest.mark.parametrize(("options", "processor"), PENALTIES, ids=[*"abcde"])
def test_penalties_are_those_of_the_text_without_its_placeholders(released, prompt, options, processor):
    model, image_token_id = released
    one = row_of(prompt, model, 1)
    text = one["input_ids"][one["input_ids"] != image_token_id][None]
    with torch.no_grad():
        expected = answer_by_hand(model, one, processor(text))
    assert answer(model, one, **options) == expected
    assert expected != answer(model, one)


@pytest.mark.parametrize("cache", [{"use_cache": False}, STATIC], ids=["none", "static"])
def test_penalties_are_the_same_with_every_cache(released, prompt, cache):
    options = {"repetition_penalty": 1.7, "encoder_repetition_penalty": 2.0}
    assert answer(released[0], prompt, **options, **cache) == answer(released[0], prompt, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]], "sequence_bias": {(8,): 3.0}},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(10, 30)},
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
    ],
    ids=" ".join,
)
def test_rows_of_a_batch_are_answered_as_alone(released, prompt, options):
    model, _ = released
    alone = [answer(model, row_of(prompt, model, row), **options)[0] for row in (0, 1)]
    assert answer(model, prompt, **options) == alone


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
def test_decoding_with_help_gives_the_same_answer(released, prompt, helper):
    model, _ = released
    one = row_of(prompt, model, 1)
    options = {
        helper: model if helper == "assistant_model" else 4,
        "repetition_penalty": 1.1,
        "max_new_tokens": 16,
    }
    assert answer(model, one, **options) == answer(model, one, **{**options, helper: None})


def test_a_copied_prompt_ends_before_a_placeholder(released, prompt):
    """Words behind the last one's twin are guessed at once, and here an image is behind it."""
    model, image_token_id = released
    one = row_of(prompt, model, 1)
    ids = one["input_ids"].clone()
    first = (ids[0] == image_token_id).nonzero()[0, 0]
    twin = next(token for token in range(50, 500) if token not in ids)
    ids[0, first - 1] = ids[0, -1] = twin
    one = {**one, "input_ids": ids}
    assert answer(model, one, prompt_lookup_num_tokens=4) == answer(model, one)


def test_a_placeholder_is_never_an_answer(released, prompt):
    model, image_token_id = copy.deepcopy(released[0]), released[1]
    if image_token_id < model.config.text_config.vocab_size:
        bias = torch.zeros(model.config.text_config.vocab_size)
        bias[image_token_id] = 1e4
        model.lm_head.bias = torch.nn.Parameter(bias)
    for options in ({}, {"do_sample": True, "use_cache": False, "max_new_tokens": 6}):
        assert not any(image_token_id in row for row in answer(model, prompt, **options))


# ---- keywords


@pytest.mark.parametrize("kind", KINDS)
def test_a_keyword_that_nothing_reads_is_refused(models, kind):
    model, inputs = models[kind]
    for name in ("lables", "pixel_value", "nonsense"):
        with pytest.raises(TypeError, match=name):
            model(**inputs, **{name: torch.tensor([0, 1])})


def test_a_misspelt_keyword_of_an_assistant_is_told_the_right_one(models):
    model, inputs = models["assistant"]
    for misspelt, meant in {
        "lables": "labels",
        "logit_to_keep": "logits_to_keep",
        "output_hiden_states": "output_hidden_states",
    }.items():
        with pytest.raises(TypeError, match=f"knows no '{misspelt}'; did you mean '{meant}'"):
            model(**inputs, **{misspelt: 1})
    with pytest.raises(ValueError, match="lables"):
        model.generate(**inputs, lables=inputs["input_ids"])


def test_an_assistant_takes_what_transformers_and_its_processor_hand_over(assistant, draw):
    marks = {"return_mm_token_type_ids": True, "return_assistant_tokens_mask": True}
    inputs = dict(asking(assistant, draw, **marks))
    assert {"mm_token_type_ids", "assistant_masks"} <= inputs.keys()
    length = inputs["input_ids"].shape[1]
    handed = {
        "num_items_in_batch": 3,
        "cache_position": torch.arange(length),
        "position_ids": torch.arange(length)[None],
        "use_cache": False,
        "output_attentions": False,
        "output_router_logits": False,
        "is_causal": True,
        "cu_seq_lens_q": None,
        "max_length_k": None,
        "ignore_index": -100,
        "shift_labels": None,
    }
    expected = assistant.model(**asking(assistant, draw)).logits
    for model in (assistant.model, assistant.model.model):
        for name, value in handed.items():
            if model is assistant.model or name not in ("ignore_index", "shift_labels"):
                out = model(**inputs, **{name: value})
    torch.testing.assert_close(assistant.model(**inputs, **handed).logits, expected)
    assert out.last_hidden_state.shape[1] == length


def test_a_servers_own_attention_is_handed_what_it_wants(assistant, draw):
    """As vLLM and SGLang reach their kernels through a model's forward."""
    seen = []

    def attention(module, query, key, value, attention_mask, scaling=None, tables=None, **kwargs):
        seen.append(tables)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling)

    model, inputs = copy.deepcopy(assistant.model), asking(assistant, draw)
    AttentionInterface.register("servers_own", attention)
    model.model.language_model.config._attn_implementation = "servers_own"
    model(**inputs, tables=7)
    assert seen == [7] * model.config.text_config.num_hidden_layers


def test_processors_know_their_keywords(assistant, draw, tmp_path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    image, processor = draw(9, 9), assistant.processor
    calls = [
        lambda **k: processor(images=image, text="<image> a", **k),
        lambda **k: processor.apply_chat_template(chat(image), **k),
        lambda **k: processor.apply_chat_template(chat(image), tokenize=True, **k),
        lambda **k: processor.image_processor(image, **k),
        *(
            lambda kind=kind, **k: kind.from_pretrained(tmp_path, **k)
            for kind in (StepwellProcessor, AutoProcessor, StepwellImageProcessor, AutoImageProcessor)
        ),
    ]
    for call in calls:
        call()
        with pytest.raises(ValueError, match="nonsense"):
            call(nonsense=3)
    assert (
        AutoProcessor.from_pretrained(
            tmp_path, padding_side="left", truncation_side="left"
        ).tokenizer.truncation_side
        == "left"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_loads_with_no_keyword_that_nobody_knows(models, kind, tmp_path):
    model, _ = models[kind]
    model.save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match="nonsense"):
        type(model).from_pretrained(tmp_path, nonsense=3)


# ---- sizes of vocabulary and head


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_grows_over_the_placeholder_and_is_saved(build, draw, tied, tmp_path):
    assistant = build(PLAIN)
    config = copy.deepcopy(assistant.model.config)
    size = config.image_token_id = config.text_config.vocab_size
    config.text_config.tie_word_embeddings = tied
    model = StepwellForConditionalGeneration(config).eval()
    ids = asking(assistant, draw)["input_ids"]
    is_placeholder = ids == assistant.processor.image_token_id
    inputs = {**asking(assistant, draw), "input_ids": ids.masked_fill(is_placeholder, size)}
    before = model(**inputs)
    model.resize_token_embeddings(size + 5)
    assert model.config.text_config.vocab_size == size + 5
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (size + 5, 32)
    out = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(out.image_hidden_states, before.image_hidden_states)
    torch.testing.assert_close(out.logits[..., :size], before.logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(again(**inputs).logits, out.logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is StepwellModel
    assert torch.equal(base(**inputs).last_hidden_state, out.last_hidden_state)
    base.resize_token_embeddings(size)
    assert base.config.text_config.vocab_size == size
    torch.testing.assert_close(base(**inputs).last_hidden_state, out.last_hidden_state)


def fits_newly(parameters):
    values = torch.cat([parameter.flatten() for parameter in parameters])
    return bool(values.isfinite().all()) and 0 < values.std() < 1 and values.abs().max() < 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_of_another_size_starts_anew_where_that_is_asked_for(models, kind, tmp_path):
    model, inputs = models[kind]
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    if kind in ("model", "assistant"):
        config.text_config.vocab_size += 7
    elif kind == "classifier":
        config.num_labels = 5
    else:
        fields = json.loads((tmp_path / "config.json").read_text())["pyramid"]
        fields["branches"][1]["arguments"]["dim"] = 32
        config = PyramidBackboneConfig(fields)
    with pytest.raises(RuntimeError, match="ismatch"):
        type(model).from_pretrained(tmp_path, config=config)
    used = [torch.full((64, 64), float("nan")) for _ in range(50)]  # memory as it is in a long program
    del used
    again, report = type(model).from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    started = {name for name, *_ in report["mismatched_keys"]}
    assert started
    ours, theirs = dict(again.named_parameters()), dict(model.named_parameters())
    assert fits_newly([ours[name] for name in started if ours[name].ndim > 1])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - started)
    assert torch.cat([t.flatten() for t in tensors_of(again(**inputs))]).isfinite().all()


def tensors_of(out):
    values = [out.feature_maps] if "feature_maps" in out else [(out[0],)]
    return [tensor for group in values for tensor in group]


def test_names_of_classes_count_them(tmp_path):
    classifier_of(3).save_pretrained(tmp_path)
    names = {0: "cat", 1: "dog"}
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path, id2label=names, label2id={"cat": 0, "dog": 1}, ignore_mismatched_sizes=True
    )
    assert model(PIXELS).logits.shape == (2, 2)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).id2label == names


# ---- precision and device


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_are_taken_in_any_precision(models, kind, dtype):
    model, inputs = models[kind]
    half = copy.deepcopy(model).to(dtype)
    assert all(tensor.dtype == dtype for tensor in tensors_of(half(**inputs)))
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(model(**inputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_runs_under_autocast(models, kind):
    model, inputs = models[kind]
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(**inputs)
        sum(tensor.float().square().mean() for tensor in tensors_of(out)).backward()
    gradients = [
        p.grad for name, p in model.named_parameters() if "patch_embed" in name and p.grad is not None
    ]
    assert gradients
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_images_on_another_device_are_refused_in_words(models, kind):
    model, inputs = models[kind]
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to("meta")}
    with pytest.raises(ValueError, match=r"pixel_values are on meta, the model is on cpu; .*inputs.to"):
        model(**inputs)


# ---- batches without an image


def test_batches_without_an_image_are_text(build):
    assistant = build()
    model, processor = assistant.model.eval(), assistant.processor
    text = processor(text=["What is two and two?", "Why?"], padding=True, return_tensors="pt")
    language = {name: text[name] for name in ("input_ids", "attention_mask")}
    expected = model.model.language_model(**language).last_hidden_state
    none = {"pixel_values": None, "image_sizes": None}
    joined = {"pixel_values": torch.zeros(0, 3), "image_sizes": torch.zeros(0, 2, dtype=torch.long)}
    for images in ({}, none, joined):
        assert torch.equal(model(**language, **images).last_hidden_state, expected)
        for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
            out = model.generate(**language, **images, max_new_tokens=3, do_sample=False, **options)
            assert torch.equal(out, model.generate(**language, max_new_tokens=3, do_sample=False, **options))
    for images in ([], [[], []], None):
        assert processor(images=images, text=["a", "b"]).keys() == {"input_ids", "attention_mask"}


def test_a_batch_without_an_image_does_not_end_the_training_of_vision_alone(build, tmp_path):
    assistant = build(PLAIN)
    model, start = assistant.model, copy.deepcopy(assistant.model.state_dict())
    model.requires_grad_(False)
    model.model.vision.projector.requires_grad_(True)
    row = {name: value[0] for name, value in assistant.processor(text="Why?", return_tensors="pt").items()}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, weight_decay=0.0, **QUIET)
    Trainer(model, arguments, train_dataset=[{**row, "labels": row["input_ids"]}] * 2).train()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


# ---- folders and Trainer


@pytest.mark.parametrize("kind", ["backbone", "classifier"])
def test_a_saved_model_brings_its_image_processor(models, kind, draw, tmp_path):
    model, _ = models[kind]
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = draw(90, 70)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape[2:] == ((70, 90) if kind == "backbone" else (64, 64))
    mean, std = (torch.tensor(values)[:, None, None] for values in model.config.settings.statistics)
    shown = pixels[0] * std + mean
    assert shown.min() >= -1e-3
    assert shown.max() <= 1 + 1e-3


def test_a_pipeline_takes_a_classifiers_folder(models, draw, tmp_path):
    model, _ = models["classifier"]
    model.save_pretrained(tmp_path)
    answers = pipeline("image-classification", model=str(tmp_path))(draw(90, 70))
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(draw(90, 70), return_tensors="pt")
    expected = model(**inputs).logits[0].softmax(0)
    assert {a["label"]: pytest.approx(a["score"], abs=1e-6) for a in answers} == {
        f"LABEL_{i}": score for i, score in enumerate(expected.tolist())
    }


def test_a_processor_of_the_users_stays_and_one_of_an_older_model_does_not(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    small = ClassifierSettings(branches=BRANCHES[:1])
    PyramidForImageClassification(PyramidClassifierConfig(small)).save_pretrained(tmp_path)
    assert json.loads(file.read_text())["size"] == {"shortest_edge": 32}
    model = classifier_of()
    model.save_pretrained(tmp_path)
    assert json.loads(file.read_text())["size"] == {"shortest_edge": 64}
    own = AutoImageProcessor.from_pretrained(tmp_path, size={"shortest_edge": 72})
    own.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert json.loads(file.read_text())["size"] == {"shortest_edge": 72}
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("kind", ["assistant", "classifier"])
def test_trainer_gives_metrics_the_logits_saves_and_goes_on(models, kind, tmp_path):
    model, inputs = models[kind]
    labels = inputs.get("input_ids", torch.tensor([0, 2]))
    seen = []

    def first(logits, labels):
        seen.append(logits)
        return logits.argmax(-1)

    def trainer(model, folder, steps):
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            **QUIET,
        )
        return Trainer(
            model,
            arguments,
            data_collator=lambda rows: rows[0],
            train_dataset=[{**inputs, "labels": labels}] * 2,
            eval_dataset=[{**inputs, "labels": labels}],
            preprocess_logits_for_metrics=first,
            compute_metrics=lambda e: {"right": float((e.predictions == e.label_ids).mean())},
        )

    model.eval()
    expected = model(**inputs).logits
    metrics = trainer(copy.deepcopy(model), tmp_path, 1).evaluate()
    assert torch.equal(seen[0], expected)
    assert metrics["eval_right"] == (expected.argmax(-1) == labels)[:1].float().mean()  # of one sample
    through, halves = copy.deepcopy(model), copy.deepcopy(model)
    trainer(through, tmp_path / "through", 2).train()
    trainer(halves, tmp_path / "halves", 1).train()
    again = trainer(copy.deepcopy(model), tmp_path / "halves", 2)
    again.train(resume_from_checkpoint=True)
    for (name, a), b in zip(through.state_dict().items(), again.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert any(not torch.equal(a, model.state_dict()[name]) for name, a in through.state_dict().items())
