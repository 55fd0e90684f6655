"""One noun: ask, stream, features."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image

import stepwell
from stepwell.images.limits import ImageLimits
from stepwell.models import ask
from stepwell.structures import TokenMap
from stepwell.weights.light import load_to_ask


def test_batch_gives_the_answers_of_single_questions(assistant, draw):
    pairs = [([draw(90, 60)], "What is it?"), ([draw(30, 90)], "And this one here?")]
    together = assistant.ask_many(pairs, max_new_tokens=8)
    assert together == [assistant.ask(images, question, max_new_tokens=8) for images, question in pairs]


def test_streamed_pieces_join_to_the_answer(assistant, draw):
    pieces = []
    answer = assistant.ask(draw(90, 60), "What is it?", max_new_tokens=8, stream=pieces.append)
    assert "".join(pieces).strip() == answer


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_an_empty_question_is_refused(assistant, draw, question):
    with pytest.raises(ValueError, match="question is empty"):
        assistant.ask(draw(9, 9), question)


def test_several_images_in_one_question_are_all_seen(assistant, draw):
    a, b = draw(60, 60, 1), draw(60, 60, 2)
    layout = assistant.layout(a)
    inputs = assistant.processor.prompt(
        [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": a},
                        {"type": "image", "image": b},
                        {"type": "text", "text": "?"},
                    ],
                }
            ]
        ]
    )
    count = int((inputs["input_ids"] == assistant.processor.image_token_id).sum())
    assert count == 2 * layout.num_visual
    assert isinstance(assistant.ask([a, b], "Which?", max_new_tokens=2), str)


def test_the_placeholder_is_never_an_answer(assistant, draw):
    """However likely: what is next in line is said, as if the vocabulary had no placeholder."""
    expected = assistant.ask(draw(60, 60), "What?", max_new_tokens=4)
    assert expected
    placeholder = assistant.processor.image_token_id
    handle = assistant.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([placeholder]), 1e4)
    )
    try:
        assert assistant.ask(draw(60, 60), "What?", max_new_tokens=4) == expected
    finally:
        handle.remove()


def test_an_opened_image_is_not_copied_on_its_way(assistant, draw, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was copied")

    image = draw(90, 60)
    monkeypatch.setattr(Image.Image, "copy", refuse)
    monkeypatch.setattr(Image.Image, "convert", refuse)
    assert assistant.layout(image).image_size == (60, 90)
    assistant.ask(image, "What is it?", max_new_tokens=1)


def test_an_image_is_encoded_once_for_all_questions(assistant, draw):
    encoder, calls = assistant.model.model.vision.encoder.branches[0], []
    handle = encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        a, questions = draw(90, 60), ["What is it?", "What else?", "And how many are there?"]
        answers = assistant.ask(a, questions, max_new_tokens=6)
        assert len(calls) == 1
        encoded = assistant.encode(a)
        assert [assistant.ask(encoded, text, max_new_tokens=6) for text in questions] == answers
        assert len(calls) == 2
        assert assistant.ask([encoded, draw(40, 40)], "Which?", max_new_tokens=2) is not None
        assert len(calls) == 3
    finally:
        handle.remove()


def test_many_are_batched_and_told_as_they_come(assistant, draw):
    pairs = [([draw(90, 60, i)], "What is it?") for i in range(5)]
    counts = []
    answers = assistant.ask_many(pairs, max_new_tokens=4, batch_size=2, progress=counts.append)
    assert counts == [2, 4, 5]
    assert answers == assistant.ask_many(pairs, max_new_tokens=4, batch_size=5)
    counts.clear()
    features = assistant.encode_many([images[0] for images, _ in pairs], batch_size=3, progress=counts.append)
    assert counts == [3, 5]
    for (images, _), made in zip(pairs, features, strict=True):
        torch.testing.assert_close(made.tokens, assistant.features(images[0]).tokens)
    assert assistant.ask_many([]) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        assistant.ask_many(pairs, batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        assistant.encode_many(iter([]), batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        assistant.ask_many(pairs, max_new_tokens=0)


@pytest.fixture
def encoded(assistant, monkeypatch):
    """The sizes of the inputs of every image, call by call of the encoder."""
    calls = []
    encode = assistant.engine.encode

    def spy(inputs, layouts):
        calls.append([layout.inputs for layout in layouts])
        return encode(inputs, layouts)

    monkeypatch.setattr(assistant.engine, "encode", spy)
    return calls


def test_images_alike_in_layout_are_encoded_together(assistant, draw, encoded):
    images = [draw(*((90, 60) if i % 2 else (60, 90)), i) for i in range(6)]
    features = assistant.encode_many(images, batch_size=3)
    assert len(encoded) == 2
    assert [len(set(batch)) for batch in encoded] == [1, 1]
    assert encoded[0][0] != encoded[1][0]
    for image, made in zip(images, features, strict=True):
        torch.testing.assert_close(made.tokens, assistant.features(image).tokens)
    encoded.clear()
    pairs = [([image], "What is it?") for image in images]
    answers = assistant.ask_many(pairs, max_new_tokens=4, batch_size=3)
    assert [len(set(batch)) for batch in encoded] == [1, 1]
    assert answers == [assistant.ask(image, "What is it?", max_new_tokens=4) for image in images]


def test_questions_about_one_image_are_answered_together(assistant, draw, encoded, tmp_path):
    names = [tmp_path / "a.png", str(tmp_path / "b.png")]
    for seed, name in enumerate(names):
        draw(60, 60, seed).save(name)
    pairs = [([name], text) for text in ("What?", "Which?") for name in names]
    assistant.ask_many(pairs, max_new_tokens=2, batch_size=2)
    assert [len(batch) for batch in encoded] == [1, 1]


def test_a_window_of_images_is_taken_before_they_are_encoded(assistant, draw, encoded, monkeypatch):
    monkeypatch.setattr(ask, "WINDOW", 2)
    taken = []
    images = (taken.append(len(encoded)) or draw(40, 40, i) for i in range(5))
    counts = []
    assert len(assistant.encode_many(images, batch_size=1, progress=counts.append)) == 5
    assert counts == [1, 2, 3, 4, 5]
    assert taken == [0, 0, 2, 2, 4]


def test_files_that_can_be_read_once_are_batched_too(assistant, draw):
    def file(seed):
        buffer = io.BytesIO()
        draw(60, 40, seed).save(buffer, "PNG")
        buffer.seek(0)
        return buffer

    pairs = [([file(i)], "What is it?") for i in range(3)]
    answers = assistant.ask_many(pairs, max_new_tokens=3, batch_size=1)
    assert answers == [assistant.ask(draw(60, 40, i), "What is it?", max_new_tokens=3) for i in range(3)]


def test_an_assistant_opens_files_within_the_limits_it_was_loaded_with(assistant, draw, tmp_path):
    draw(402, 2).save(tmp_path / "wide.png")
    path, loose = tmp_path / "wide.png", ImageLimits(max_aspect=201)
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    opened = stepwell.open_image(path, limits=loose)
    answer = assistant.ask(opened, "What is it?", max_new_tokens=4)
    for load in (stepwell.load, load_to_ask):
        model = load(tmp_path, limits=loose)
        for image in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
            assert model.ask(image, "What is it?", max_new_tokens=4) == answer
        assert model.ask_many([([path], "What is it?")], max_new_tokens=4) == [answer]
        assert model.layout(path).image_size == model.encode(path).layout.image_size == (2, 402)
        strict = load(tmp_path)
        for call in (strict.layout, strict.encode, lambda image, ask=strict.ask: ask(image, "What?")):
            with pytest.raises(stepwell.ImageError, match=r"limits=ImageLimits\(max_aspect=201\)"):
                call(path)
        assert strict.ask(opened, "What is it?", max_new_tokens=4) == answer
        once = {"limits": loose}
        assert strict.ask(path, "What is it?", max_new_tokens=4, **once) == answer
        assert strict.ask_many([(path, "What is it?")], max_new_tokens=4, **once) == [answer]
        layouts = [strict.layout(path, **once), strict.encode(path, **once).layout]
        layouts += [features.layout for features in strict.encode_many([path], **once)]
        assert {layout.image_size for layout in layouts} == {(2, 402)}
        with pytest.raises(stepwell.ImageError, match="max_aspect=201"):
            strict.ask(path, "What?")
        strict.limits = loose
        assert strict.ask(path, "What is it?", max_new_tokens=4) == answer


@pytest.mark.parametrize("other", [None, 3, [[1, 2], [3, 4]], {"url": "a.png"}, {"image": b""}])
def test_what_is_no_image_is_refused_in_one_line(assistant, other):
    with pytest.raises((TypeError, ValueError), match="an image") as refusal:
        assistant.ask(other, "What is it?")
    assert str(refusal.value).isprintable()


def test_arrays_and_tensors_are_asked_about(assistant, draw):
    image = draw(90, 60)
    expected = assistant.ask(image, "What is it?", max_new_tokens=4)
    colours = torch.from_numpy(np.array(image))
    for same in (np.asarray(image), colours.permute(2, 0, 1), (colours / 255).bfloat16().requires_grad_()):
        assert assistant.layout(same).image_size == (60, 90)
        assert assistant.features(same).layout.image_size == (60, 90)
    assert assistant.ask(colours.permute(2, 0, 1), "What is it?", max_new_tokens=4) == expected


def test_settings_of_a_folders_generation_are_left_aside(assistant, draw):
    expected = assistant.ask(draw(90, 60), "What is it?", max_new_tokens=12)
    kept = assistant.model.generation_config
    assistant.model.generation_config = copy.deepcopy(kept)
    assistant.model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3)
    try:
        assert assistant.ask(draw(90, 60), "What is it?", max_new_tokens=12) == expected
        assert assistant.model.generation_config.repetition_penalty == 5.0
    finally:
        assistant.model.generation_config = kept


def test_a_long_question_does_not_cut_the_answers_beside_it(assistant, draw):
    engine, image = assistant.engine, draw(90, 60)
    short, long = "What?", "What is written on this? " * 6
    kept = engine.max_positions
    engine.max_positions = len(assistant.prompt(long, [assistant.layout(image)])) + 2
    try:
        expected = [assistant.ask(image, text, max_new_tokens=12) for text in (short, long)]
        assert assistant.ask(image, [short, long], max_new_tokens=12) == expected
        assert len(expected[0]) > len(expected[1])
    finally:
        engine.max_positions = kept


def test_a_question_without_a_position_is_refused_before_an_image_is_encoded(assistant, draw, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("an image was encoded")

    monkeypatch.setattr(assistant.engine, "encode", refuse)
    with pytest.raises(ValueError, match="show smaller or fewer images"):
        assistant.ask([draw(90, 60)] * 300, "What?")


def test_text_is_made_as_it_comes_only_where_somebody_listens(assistant, draw, monkeypatch):
    kind, calls = type(assistant.engine.tokenizer), []
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    assistant.ask(draw(90, 60), "What is it?", max_new_tokens=8)
    assert len(calls) == 1
    assistant.ask(draw(90, 60), "What is it?", max_new_tokens=8, stream=lambda text: None)
    assert len(calls) > 3


def test_what_exceeds_the_language_models_positions_is_refused_and_answers_end_with_them(assistant, draw):
    length = len(assistant.prompt("What is it?", [assistant.layout(draw(90, 60))]))
    engine, lengths = assistant.engine, []
    kept = engine.max_positions
    assert kept == assistant.model.config.text_config.max_position_embeddings
    handle = assistant.model.lm_head.register_forward_hook(lambda *_: lengths.append(1))
    try:
        engine.max_positions = length + 3
        assistant.ask(draw(90, 60), "What is it?", max_new_tokens=50)
        assert len(lengths) <= 3
        engine.max_positions = length
        with pytest.raises(ValueError, match=rf"takes {length} tokens, .* made for {length}; show smaller"):
            assistant.ask(draw(90, 60), "What is it?")
    finally:
        engine.max_positions = kept
        handle.remove()


def test_half_characters_of_a_question_are_replaced(assistant, draw):
    """The tokenizer would refuse them with an error of its own."""
    told = assistant.ask(draw(90, 60), "gr\ufffd?", max_new_tokens=6)
    assert assistant.ask(draw(90, 60), "gr\ud83d?", max_new_tokens=6) == told


def test_one_image_of_a_pair_needs_no_list(assistant, draw, tmp_path):
    draw(90, 60).save(tmp_path / "a.png")
    expected = [assistant.ask(draw(90, 60), "What is it?", max_new_tokens=4)]
    encoded = assistant.encode(draw(90, 60))
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), draw(90, 60), encoded, [encoded], (encoded,)):
        assert assistant.ask_many([(image, "What is it?")], max_new_tokens=4) == expected
        assert assistant.ask_many(iter([(image, "What is it?")]), max_new_tokens=4) == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a, x: a.features([x, x]), "features and encode take one image; encode_many takes a list"),
        (lambda a, x: a.encode((x,)), "encode take one image"),
        (lambda a, x: a.encode(5), "an image is a path, .* got int"),
        (lambda a, x: a.layout([x]), "an image is a path, .* got list of 1"),
        (lambda a, x: a.encode_many("a.png"), "takes a list of images, got str"),
        (lambda a, x: a.encode_many(x), "takes a list of images, got Image"),
        (lambda a, x: a.encode_many(a.encode(x)), "takes a list of images, got VisionFeatures"),
        (lambda a, x: a.encode_many({"image": x}), "takes a list of images, got dict"),
        (lambda a, x: a.encode_many(None), "takes a list of images, got NoneType"),
        (lambda a, x: a.encode_many([[x]]), "an image is a path, .* got list of 1"),
        (lambda a, x: a.ask(x, None), "a question is a text, or a list of texts, got NoneType"),
        (lambda a, x: a.ask(x, b"What?"), "a question is a text, or a list of texts, got bytes"),
        (lambda a, x: a.ask([x, x], [1]), "a question is a text, got int"),
        (lambda a, x: a.ask(x, [["What?"]]), "a question is a text, got list of 1"),
        (lambda a, x: a.ask([[x]], "What?"), "an image is a path, .* got list of 1"),
        (lambda a, x: a.ask([], "What?"), "needs at least one image"),
        (lambda a, x: a.ask_many(None), r"takes \(image or images, question\) pairs, .* got NoneType"),
        (lambda a, x: a.ask_many("ab"), "pairs, .* got str"),
        (lambda a, x: a.ask_many({"image": x, "question": "?"}), "pairs, .* got dict"),
        (lambda a, x: a.ask_many(["ab"]), "pairs, .*; entry 0 is str"),
        (lambda a, x: a.ask_many([(x, "?"), {"image": x, "question": "?"}]), "pairs, .*; entry 1 is dict"),
        (lambda a, x: a.ask_many([(x, "?", None, 1)]), "pairs, .*; entry 0 is tuple of 4"),
        (lambda a, x: a.ask_many((x, "What?")), "pairs, .*; entry 0 is Image"),
        (lambda a, x: a.ask_many([(x, ["What?"])]), "a question is a text, got list of 1"),
        (lambda a, x: a.ask_many([(5, "What?")]), "an image is a path, .* got int"),
    ],
)
def test_what_is_of_another_shape_is_told_what_is_wanted(assistant, draw, call, words):
    with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
        call(assistant, draw(20, 20))


def test_what_is_printed_of_features_and_of_an_assistant_fits_a_screen(assistant, draw):
    features = assistant.features(draw(90, 60))
    first = features.maps[0]
    told = repr(features)
    assert len(told) < 400
    assert f"tokens={tuple(features.tokens.shape)} {features.tokens.dtype}" in told
    assert repr(first) in told
    assert f"map={tuple(first.map.shape)} torch.float32" in repr(first)
    assert len(repr(features._replace(maps=100 * features.maps))) < 500
    tokens = TokenMap(torch.zeros(1, 6, 4), (2, 3), registers=torch.zeros(1, 2, 4))
    assert repr(tokens) == (
        "TokenMap(tokens=(1, 6, 4) torch.float32, size=(2, 3), registers=(1, 2, 4) torch.float32)"
    )
    assert "StepwellForConditionalGeneration, " in repr(assistant)
    assert len(repr(assistant)) < 400
    assert repr(ask.Assistant.on(assistant.engine)).startswith("Assistant(TransformersEngine, ")
