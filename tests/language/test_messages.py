"""Messages as transformers and OpenAI write them: their texts and their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepwell.language.messages import images_of, with_texts


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": b"a"}, b"a"),
        ({"type": "image", "image": Path("a.png")}, Path("a.png")),
        ({"type": "image", "url": "data:,b"}, "data:,b"),
        ({"type": "image", "path": Path("c.png")}, Path("c.png")),
        ({"type": "image", "base64": "R0lG"}, "data:image;base64,R0lG"),
        ({"type": "image", "image": {"bytes": b"a", "path": "c.png"}}, {"bytes": b"a", "path": "c.png"}),
        (
            {"type": "image", "image": {"bytes": None, "path": Path("c.png")}},
            {"bytes": None, "path": Path("c.png")},
        ),
        ({"type": "image", "image_url": {"url": "DATA:,d"}}, "DATA:,d"),
        ({"type": "image_url", "image_url": {"url": "data:,d", "detail": "low"}}, "data:,d"),
        ({"type": "image_url", "image_url": "data:,e"}, "data:,e"),
    ],
)
def test_an_image_is_found_however_it_is_written(part: dict[str, Any], image: object) -> None:
    assert images_of([user(part)]) == [image]


@pytest.mark.parametrize("name", ["a.png", "/etc/passwd", "file:///etc/passwd", "http://a/b.png", "", "data"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: {"type": "image", "image": name},
        lambda name: {"type": "image", "url": name},
        lambda name: {"type": "image", "path": name},
        lambda name: {"type": "image", "image_url": name},
        lambda name: {"type": "image", "image": {"url": name}},
        lambda name: {"type": "image", "image": {"path": name}},
        lambda name: {"type": "image", "path": {"bytes": None, "path": name}},
        lambda name: {"type": "image", "url": {"url": {"path": name}}},
        lambda name: {"type": "image_url", "image_url": name},
        lambda name: {"type": "image_url", "image_url": {"url": name}},
        lambda name: {"type": "image_url", "image_url": {"path": name}},
        lambda name: {"type": "image_url", "url": name},
    ],
)
def test_no_text_in_a_message_names_an_image(wrap: Any, name: str) -> None:
    with pytest.raises(ValueError, match="no text names a file or an address to open") as refusal:
        images_of([user({"type": "text", "text": "?"}), user(wrap(name))])
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("image", [["a.png"], (b"a", b"b"), [Path("a.png")], []])
def test_a_part_holds_one_image(image: object) -> None:
    with pytest.raises(ValueError, match="holds one image, got a list"):
        images_of([user({"type": "image", "image": image})])


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
        ({"role": "user", "content": [{"image": "a.png"}]}, "the content of a message is text, or a list"),
        ({"role": "user", "content": [{"type": None}]}, "the content of a message is text, or a list"),
        ({"role": "user", "content": {"type": "image"}}, "the content of a message is text, or a list"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        with_texts(message, str)
