"""One noun: ask, stream, features."""

from __future__ import annotations

import pytest
from PIL import Image


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
    bias = assistant.model.lm_head.weight.detach().clone()
    try:
        assistant.model.lm_head.weight.data[assistant.processor.image_token_id] = 100 * bias.abs().max()
        answer = assistant.ask(draw(60, 60), "What?", max_new_tokens=4)
    finally:
        assistant.model.lm_head.weight.data.copy_(bias)
    assert "<image>" not in answer


def test_an_opened_image_is_not_copied_on_its_way(assistant, draw, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was copied")

    image = draw(90, 60)
    monkeypatch.setattr(Image.Image, "copy", refuse)
    monkeypatch.setattr(Image.Image, "convert", refuse)
    assert assistant.layout(image).image_size == (60, 90)
    assistant.ask(image, "What is it?", max_new_tokens=1)
