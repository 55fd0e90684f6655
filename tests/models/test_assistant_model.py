"""The model as transformers sees it: counts, batches, caches, beams, saving."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CohereConfig,
    DynamicCache,
    Gemma2Config,
    GraniteConfig,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import stepwell
from stepwell.encoders.vit import TransformerBlock
from stepwell.fuse.interaction import Interaction
from stepwell.language import splice
from stepwell.models.assistant import CACHE, StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.ops.pack import unpack


def ask_ids(assistant, images, texts, **arguments):
    inputs = assistant.processor.prompt(
        [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": image} for image in row),
                        {"type": "text", "text": text},
                    ],
                }
            ]
            for row, text in zip(images, texts, strict=True)
        ]
    )
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **arguments}
    return assistant.model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_batch_of_different_sizes_equals_single(build, vision, draw, family):
    assistant = build(vision, family)
    rows = [
        [draw(90, 60, 1)],
        [draw(40, 200, 2), draw(64, 64, 3)],
        [],
        [draw(300, 30, 4)],
    ]
    texts = ["What is it?", "Compare the two images, please.", "No image here?", "And this?"]
    together = ask_ids(assistant, rows, texts)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        assert together[i].tolist() == ask_ids(assistant, [row], [text])[0].tolist()


def test_answers_depend_on_the_image(assistant, draw):
    def logits(image):
        inputs = assistant.processor(images=image, text="<image> what?", return_tensors="pt")
        return assistant.model(**inputs).logits[:, -1]

    assert (logits(draw(90, 60, 1)) - logits(draw(90, 60, 2))).abs().max() > 1e-3


def test_static_cache_gives_the_same_answer(assistant, draw):
    rows, texts = [[draw(90, 60)]], ["What is it?"]
    dynamic = ask_ids(assistant, rows, texts)
    static = ask_ids(assistant, rows, texts, cache_implementation="static", disable_compile=True)
    assert static.tolist() == dynamic.tolist()


def test_no_cache_gives_the_same_answer(assistant, draw):
    rows, texts = [[draw(90, 60)]], ["What is it?"]
    assert (
        ask_ids(assistant, rows, texts, use_cache=False).tolist() == ask_ids(assistant, rows, texts).tolist()
    )


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_taken_by_either_name_and_goes_on_where_it_stood(assistant, draw, name):
    inputs = assistant.processor(images=draw(90, 60), text="<image> what is it?", return_tensors="pt")
    whole = assistant.model(**inputs, use_cache=False).logits[:, -1]
    last = inputs["input_ids"][:, -1:]
    for kind in ("input_ids", "attention_mask"):
        inputs[kind] = inputs[kind][:, :-1]
    cache = DynamicCache(config=assistant.model.config.text_config)
    first = assistant.model(**inputs, **{name: cache}, use_cache=True)
    assert first[CACHE] is cache
    torch.testing.assert_close(assistant.model(last, **{name: cache}).logits[:, -1], whole)


def test_beams_keep_the_images_of_their_row(assistant, draw):
    rows, texts = (
        [[draw(90, 60, 1)], [draw(40, 80, 2), draw(64, 64, 3)]],
        ["What?", "Which of the two?"],
    )
    together = ask_ids(assistant, rows, texts, num_beams=3)
    for i in range(2):
        assert (
            together[i].tolist()
            == ask_ids(assistant, rows[i : i + 1], texts[i : i + 1], num_beams=3)[0].tolist()
        )


def test_vision_compiles_without_graph_breaks(build, vision, draw):
    assistant = build(vision)
    inputs = assistant.processor(images=[draw(90, 60), draw(60, 90), draw(90, 60, 1)])
    layouts = assistant.model.model.layouts(inputs["image_sizes"])
    tensors = unpack(inputs["pixel_values"], [size for layout in layouts for size in layout.inputs])
    system = assistant.model.model.vision
    torch._dynamo.reset()  # its limit of recompilations counts those of all kinds, whose code is the same
    with torch.no_grad():
        compiled = torch.compile(system, fullgraph=True, backend="eager")(tensors, layouts)
        torch.testing.assert_close(compiled, system(tensors, layouts))


def test_saved_and_loaded_through_auto_classes(build, vision, draw, tmp_path: Path):
    assistant = build(vision)
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(model) is stepwell.StepwellForConditionalGeneration
    assert type(processor) is stepwell.StepwellProcessor
    again = stepwell.Assistant(model, processor)
    assert again.model.config.vision == vision
    assert again.model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    for (name, a), b in zip(assistant.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    row = [[draw(90, 60)]]
    assert ask_ids(again, row, ["What is it?"]).tolist() == ask_ids(assistant, row, ["What is it?"]).tolist()


def test_pipeline_answers_from_a_folder(assistant, draw, tmp_path: Path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    content = [{"type": "image", "image": draw(90, 60)}, {"type": "text", "text": "What is it?"}]
    out = pipe(
        text=[{"role": "user", "content": content}], generate_kwargs={"max_new_tokens": 6, "do_sample": False}
    )
    expected = assistant.ask(draw(90, 60), "What is it?", max_new_tokens=6)
    assert out[0]["generated_text"][-1]["content"].strip() == expected


def test_several_returned_sequences_keep_the_images_of_their_row(assistant, draw):
    rows, texts = (
        [[draw(90, 60, 1)], [draw(40, 80, 2), draw(64, 64, 3)]],
        ["What?", "Which?"],
    )
    greedy = ask_ids(assistant, rows, texts).tolist()
    sampled = ask_ids(assistant, rows, texts, do_sample=True, top_k=1, num_return_sequences=2).tolist()
    assert sampled == [greedy[0], greedy[0], greedy[1], greedy[1]]


def test_batches_made_apart_join_by_concatenation(assistant, draw):
    apart = [assistant.processor(images=image) for image in (draw(90, 60, 1), draw(40, 200, 2))]
    together = assistant.processor(images=[draw(90, 60, 1), draw(40, 200, 2)])
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(torch.cat([features[name] for features in apart]), together[name])


def test_a_cut_batch_of_pixels_is_refused_with_the_count(assistant, draw):
    inputs = assistant.processor(images=draw(90, 60))
    rows = len(inputs["pixel_values"])
    with pytest.raises(ValueError, match=rf"have {rows} pixels, but pixel_values is \({rows // 2}, 3\)"):
        assistant.model.get_image_features(inputs["pixel_values"][: rows // 2], inputs["image_sizes"])


def test_data_parallel_is_refused_in_words(assistant, draw):
    inputs = assistant.processor(images=draw(90, 60))
    replica = assistant.model.model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel cuts pixel_values.*torchrun"):
        replica.get_image_features(**inputs)


def test_features_take_one_pass_and_know_the_layout(assistant, draw):
    passes = []
    branch = assistant.model.model.vision.encoder.branches[0]
    handle = branch.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    features = assistant.features(draw(90, 60))
    handle.remove()
    assert len(passes) == 1
    assert features.layout == assistant.layout(draw(90, 60))
    assert len(features.tokens) == features.layout.num_visual
    assert [m.view for m in features.maps] == list(features.layout.views)


def test_labels_give_the_loss_of_a_causal_language_model(assistant, draw):
    inputs = assistant.processor(images=draw(90, 60), text="<image> abc", return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[labels == assistant.processor.image_token_id] = -100
    out = assistant.model(**inputs, labels=labels)
    shifted = torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(out.loss, shifted)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (CohereConfig, {"logit_scale": 0.25}),
        (GraniteConfig, {"logits_scaling": 8.0}),
        (Gemma2Config, {"final_logit_softcapping": 0.5}),
    ],
)
def test_logits_are_finished_as_the_language_model_finishes_its_own(assistant, kind, setting):
    """A scale, its inverse, and a soft cap low enough to be felt."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind(vocab_size=40, num_key_value_heads=2, head_dim=16, pad_token_id=0, **sizes, **setting)
    ours = StepwellForConditionalGeneration(
        StepwellConfig(assistant.model.config.vision, config, image_token_id=39)
    )
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.base_model.load_state_dict(ours.model.language_model.state_dict())
    torch.nn.init.normal_(ours.lm_head.weight)
    theirs.lm_head.load_state_dict(ours.lm_head.state_dict())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_placeholders_are_counted_in_the_prompt_and_not_at_every_step(assistant, draw, monkeypatch):
    """Counting them waits for the device."""
    counted = []
    place = splice.place_visual_tokens
    monkeypatch.setattr(
        "stepwell.models.assistant.place_visual_tokens",
        lambda ids, *rest: counted.append(ids.shape[1]) or place(ids, *rest),
    )
    inputs = assistant.processor(images=draw(90, 60), text="<image> a", return_tensors="pt")
    assistant.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert counted == [inputs["input_ids"].shape[1]]


def test_placeholders_without_an_image_are_refused_behind_a_cache_too(assistant, draw):
    cache = DynamicCache(config=assistant.model.config.text_config)
    assistant.model(input_ids=torch.tensor([[5, 6]]), cache=cache, use_cache=True)
    ids = torch.full((1, 2), assistant.processor.image_token_id)
    with pytest.raises(ValueError, match=r"2 image placeholder tokens.* 0 visual tokens"):
        assistant.model(input_ids=ids, cache=cache)


def test_gradients_reach_every_part(build, vision, draw):
    assistant = build(vision)
    inputs = assistant.processor(images=draw(90, 60), text="<image> abc", return_tensors="pt")
    assistant.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = [name for name, parameter in assistant.model.named_parameters() if parameter.grad is not None]
    for part in (".branches.", ".projector.", "language_model.", "lm_head."):
        assert any(part in name for name in reached), part


@pytest.mark.parametrize(("text", "images"), [("<image> a", 0), ("a", 1), ("<image><image> a", 1)])
def test_images_and_placeholders_must_match(assistant, draw, text, images):
    count = text.count("<image>")
    with pytest.raises(ValueError, match=rf"{count} <image> placeholders but {images} images"):
        assistant.processor(images=[draw(9, 9)] * images or None, text=text)


def test_model_refuses_placeholders_that_differ_from_visual_tokens(assistant, draw):
    inputs = assistant.processor(images=draw(90, 60), text="<image> a", return_tensors="pt")
    given = int((inputs["input_ids"] == assistant.processor.image_token_id).sum())
    with pytest.raises(ValueError, match=f"{given - 1} image placeholder tokens.* {given} visual tokens"):
        assistant.model(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": None})
    with pytest.raises(ValueError, match=f"{given} image placeholder tokens.* 0 visual tokens"):
        assistant.model(input_ids=inputs["input_ids"])


def test_tied_embeddings_are_saved_once_and_stay_tied(build, draw, tmp_path: Path):
    assistant = build()
    assistant.model.config.tie_word_embeddings = True
    assert assistant.model.config.text_config.tie_word_embeddings
    assistant.model.tie_weights()
    assistant.model.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_padded_batch_of_the_processor_equals_single(build, vision, draw):
    assistant = build(vision)
    images, texts = (
        [draw(90, 60, 1), draw(40, 200, 2)],
        ["<image> short", "<image> a longer question?"],
    )

    def answers(images, texts):
        inputs = assistant.processor(images=images, text=texts, padding=True, return_tensors="pt")
        out = assistant.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers(images, texts) == [answers([i], [t])[0] for i, t in zip(images, texts, strict=True)]


def test_a_pipeline_batches_images_of_different_sizes(assistant, draw, tmp_path: Path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    images = [draw(90, 60, 1), draw(40, 200, 2)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": "What?"}]}]
        for i in images
    ]
    out = pipe(text=chats, batch_size=2, generate_kwargs={"max_new_tokens": 6, "do_sample": False})
    for answer, image in zip(out, images, strict=True):
        assert answer[0]["generated_text"][-1]["content"].strip() == assistant.ask(
            image, "What?", max_new_tokens=6
        )


def test_tuples_embeddings_and_half_precision_are_taken(assistant, draw):
    inputs = assistant.processor(images=draw(90, 60), text="<image> a", return_tensors="pt")
    model = assistant.model
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, return_dict=True).logits, expected)
    loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert loss.shape == ()
    assert torch.equal(logits, expected)
    hidden, *_ = model.model(**inputs, return_dict=False)
    assert torch.equal(hidden, model(**inputs).last_hidden_state)
    model.config.return_dict = False
    try:
        assert torch.equal(model(**inputs)[0], expected)
        assert assistant.ask(draw(90, 60), "a", max_new_tokens=2) is not None
    finally:
        model.config.return_dict = True
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    assert model.generate(inputs_embeds=embeds, max_new_tokens=2).shape[0] == 1


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")
def test_gradient_checkpointing_recomputes_vision_and_language(build, vision, draw):
    assistant = build(vision)
    model = assistant.model.train()
    inputs = assistant.processor(images=draw(90, 60), text="<image> what?", return_tensors="pt")
    layers = [m for m in model.modules() if isinstance(m, TransformerBlock | Interaction)]
    layers += [m.mlp for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def runs_and_gradients():
        runs = []
        hooks = [layer.register_forward_pre_hook(lambda layer, _: runs.append(id(layer))) for layer in layers]
        model.zero_grad()
        torch.manual_seed(0)  # whole messages are dropped at random
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for hook in hooks:
            hook.remove()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return Counter(runs), gradients

    once, expected = runs_and_gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    twice, gradients = runs_and_gradients()
    assert twice == {layer: 2 * count for layer, count in once.items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
