"""Messages as transformers and OpenAI write them: their texts and their images."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell.language.messages import images_of, with_texts


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "b.png"}, "b.png"),
        ({"type": "image", "path": "c.png"}, "c.png"),
        ({"type": "image", "base64": "R0lG"}, "data:image;base64,R0lG"),
        ({"type": "image_url", "image_url": {"url": "d.png", "detail": "low"}}, "d.png"),
        ({"type": "image_url", "image_url": "e.png"}, "e.png"),
    ],
)
def test_an_image_is_found_however_it_is_written(part: dict[str, Any], image: str) -> None:
    assert images_of([user(part)]) == [image]


def test_images_come_in_reading_order_and_neither_texts_nor_empty_parts_are_any() -> None:
    first = user({"type": "image", "image": 1}, {"type": "text", "text": "?", "image": 2}, {"type": "image"})
    messages = [first, {"role": "assistant", "content": "3"}, user({"type": "image", "image": 4})]
    assert images_of([*messages, {"role": "assistant"}]) == [1, 4]


def test_texts_are_changed_and_everything_else_stays() -> None:
    asked = user(
        {"type": "text", "text": "a"}, {"type": "image", "image": 1}, {"type": "image_url", "image_url": "b"}
    )
    changed = with_texts({**asked, "name": "me"}, str.upper)
    image_parts = [{"type": "image", "image": 1}, {"type": "image"}]
    assert changed == {**user({"type": "text", "text": "A"}, *image_parts), "name": "me"}
    assert with_texts({"role": "user", "content": "a<image>b"}, str.upper)["content"] == "A<image>B"
    assert with_texts({"role": "assistant", "content": "a<image>b"}, str.upper)["content"] == "A<IMAGE>B"
    assert with_texts({"role": "assistant", "content": None}, str.upper) == {"role": "assistant"}


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("hello", "a message is a dict with a role and a content"),
        ({"content": "a"}, "a message is a dict with a role"),
        ({"role": 1, "content": "a"}, "a message is a dict with a role"),
        ({"role": "user", "content": 3}, "the content of a message is text, or a list"),
        ({"role": "user", "content": ["a"]}, "the content of a message is text, or a list"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        with_texts(message, str)
