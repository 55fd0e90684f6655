"""Conversations of any shape are answered as one by one, and what they took is counted."""

from __future__ import annotations

import pytest
import torch

from stepwell.integrations.conversations import answers_to


def decoded(assistant, ids):
    return assistant.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def user(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else image(part) for part in parts]
    return {"role": "user", "content": content}


def image(picture):
    return {"type": "image", "image": picture}


@pytest.fixture
def conversations(draw):
    one, two = draw(90, 60, 1), draw(40, 80, 2)
    said = {"role": "assistant", "content": [{"type": "text", "text": "A CAT"}]}
    return {
        "plain": [user(one, "What?")],
        "behind": [user("What?", one)],
        "several": [user(one, two, "Which?")],
        "between": [user("First", one, "then", two)],
        "apart": [user(one, "or", two)],
        "texts": [user(one, "What?", "And where?")],
        "text": [user("Hello")],
        "turns": [user(one, "What?"), said, user("Sure?")],
        "system": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user(two, "Hm?")],
    }


def generated(assistant, messages, length):
    """By transformers alone: ids of the prompt, and of the answer."""
    inputs = assistant.processor.prompt([messages])
    config = assistant.model.generation_config
    ids = assistant.model.generate(
        **inputs, do_sample=False, max_new_tokens=length, eos_token_id=config.eos_token_id
    )
    return inputs["input_ids"][0], ids[0, inputs["input_ids"].shape[1] :]


def test_every_shape_of_conversation_is_answered_in_a_batch_as_transformers_does_alone(
    assistant, conversations
):
    answers = answers_to(assistant, list(conversations.values()), max_new_tokens=6, batch_size=3)
    for name, messages, answer in zip(conversations, conversations.values(), answers, strict=True):
        prompt, ids = generated(assistant, messages, 6)
        assert answer.text == decoded(assistant, ids), name
        assert answer.prompt_tokens == len(prompt), name
        assert answer.error is None
    assert len({answer.text for answer in answers}) > 4


def test_an_image_behind_its_question_is_asked_as_one_in_front(assistant, conversations):
    front, behind = answers_to(assistant, [conversations["plain"], conversations["behind"]], max_new_tokens=4)
    assert front == behind
    assert front.text == assistant.ask(
        conversations["plain"][0]["content"][0]["image"], "What?", max_new_tokens=4
    )


def test_tokens_of_an_answer_are_counted_up_to_its_end(assistant, conversations, monkeypatch):
    """In a batch, shorter answers are padded behind their end."""
    shapes = [conversations[name] for name in ("plain", "text")]
    first, other = (generated(assistant, messages, 6)[1].tolist() for messages in shapes)
    place = next(i for i, token in enumerate(first) if i and token not in [*first[:i], *other])
    assert [answer.answer_tokens for answer in answers_to(assistant, shapes, max_new_tokens=6)] == [6, 6]
    monkeypatch.setattr(assistant.model.generation_config, "eos_token_id", [first[place], 10**6])
    assert [answer.answer_tokens for answer in answers_to(assistant, shapes, max_new_tokens=6)] == [place, 6]


def test_images_alike_in_layout_are_answered_together(assistant, draw, monkeypatch):
    sizes = [(90, 60), (40, 80), (90, 60), (40, 80)]
    shapes = [[user(draw(*size, seed), "What?")] for seed, size in enumerate(sizes)]
    batches = []
    encode = assistant.model.get_image_features

    def watched(**inputs):
        batches.append(inputs["image_sizes"].tolist())
        return encode(**inputs)

    monkeypatch.setattr(assistant.model, "get_image_features", watched)
    together = answers_to(assistant, shapes, max_new_tokens=3, batch_size=2)
    assert sorted(batches) == [[[60, 90]] * 2, [[80, 40]] * 2]
    monkeypatch.undo()
    assert together == [answers_to(assistant, [messages], max_new_tokens=3)[0] for messages in shapes]


@pytest.mark.parametrize("broken", ["plain", "text", "number"])
def test_what_cannot_be_answered_has_its_error_and_costs_no_other_its_answer(
    assistant, conversations, broken, tmp_path
):
    kinds = ["several", "turns", broken if broken in conversations else "plain"]
    whole = answers_to(assistant, [conversations[kind] for kind in kinds], max_new_tokens=3)
    missing = tmp_path / "missing.png"
    bad = {
        "plain": [user(missing, "What?")],
        "text": [user("word " * 300)],
        "number": [
            {"role": "user", "content": [{"type": "image", "image": 5}, {"type": "text", "text": "?"}]}
        ],
    }[broken]
    told = []
    answers = answers_to(
        assistant,
        [conversations["several"], bad, conversations["turns"]],
        max_new_tokens=3,
        progress=told.append,
    )
    assert [answers[0], answers[2]] == whole[:2]
    assert answers[1].text == ""
    assert {"plain": "missing.png", "text": "made for 256", "number": "image"}[broken] in answers[1].error
    assert told == [1, 2, 3]


def test_answers_end_with_the_positions_of_the_language_model_and_not_with_their_neighbours(assistant):
    """Alone, the short conversation has room for all of its tokens."""
    short, long = [user("Hello")], [user("word " * 60)]
    room = 256 - len(generated(assistant, long, 1)[0])
    together = answers_to(assistant, [short, long], max_new_tokens=room + 5)
    assert together[0] == answers_to(assistant, [short], max_new_tokens=room + 5)[0]
    _, ids = generated(assistant, long, room)
    assert together[1].text == decoded(assistant, ids)


def test_weights_are_not_touched(assistant, conversations):
    before = [parameter.clone() for parameter in assistant.model.parameters()]
    answers_to(assistant, [conversations["turns"]], max_new_tokens=2)
    assert all(map(torch.equal, before, assistant.model.parameters()))
