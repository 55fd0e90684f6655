"""Messages as transformers has them: their texts and their images.

{"role": "user", "content": text or [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}.
Messages come from whoever asks, often as JSON, so that no text in them names a file to open. Beside an image
may stand a "region" of it, [left, top, right, bottom] in fractions of its sides, that is looked at closely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["IMAGE", "Message", "image_in", "images_of", "regions_of", "text_of", "with_texts"]

IMAGE = "<image>"
"""The placeholder of one image."""

Message = Mapping[str, Any]


def with_texts(message: Message, change: Callable[[str], str]) -> Message:
    """The message with its texts changed; in a user's string, they stand around `<image>`.

    OpenAI's `image_url` becomes `image`, for templates that do not know it. Raises ValueError for what is no
    message.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a message is a dict with a role and a content")
    content = message.get("content")
    if content is None:
        return {key: value for key, value in message.items() if key != "content"}
    if isinstance(content, str):
        parts = content.split(IMAGE) if message["role"] == "user" else [content]
        return {**message, "content": IMAGE.join(map(change, parts))}
    if not isinstance(content, (list, tuple)) or not all(map(_is_part, content)):
        raise ValueError("the content of a message is text, or a list of dicts such as {'type': 'image'}")
    return {**message, "content": [_with_text(part, change) for part in content]}


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The images in messages whose content is a list, in reading order.

    Raises ValueError for a file's name or an address as text, in all ways in which a message may hold one.
    """
    images = [image for part in _parts_of(messages) if (image := image_in(part)) is not None]
    for image in images:
        _refuse_names(image)
    return images


def regions_of(messages: Sequence[Message]) -> list[Any]:
    """Of each image that `images_of` finds, in its order, what stands beside it as its region, or None.

    Raises ValueError for a region whose image stands elsewhere.
    """
    shown = [part for part in _parts_of(messages) if part.get("type") in ("image", "image_url")]
    if any(part.get("region") is not None and image_in(part) is None for part in shown):
        raise ValueError(
            "a region stands in the part that holds its image; give both there, or regions beside images"
        )
    return [part.get("region") for part in shown if image_in(part) is not None]


def text_of(message: Message) -> str:
    """All that a message says."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")


def _parts_of(messages: Sequence[Message]) -> list[Any]:
    """Of the contents that are lists."""
    contents = (message.get("content") for message in messages)
    return [part for content in contents if isinstance(content, (list, tuple)) for part in content]


def _is_part(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("type"), str)


def _with_text(part: Message, change: Callable[[str], str]) -> Message:
    if part.get("type") == "image_url":
        return {"type": "image"}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {**part, "text": change(part["text"])}
    return part


def image_in(part: Message) -> Any:
    """What one part of a message says of its image, in transformers' and in OpenAI's way of writing; None
    where it has none.
    """
    if part.get("type") not in ("image", "image_url"):
        return None
    if part.get("base64") is not None:
        return f"data:image;base64,{part['base64']}"
    keys = ("image", "image_url", "url", "path")
    image = next((part[key] for key in keys if part.get(key) is not None), None)
    return image["url"] if isinstance(image, Mapping) and "url" in image else image


def _refuse_names(image: Any) -> None:
    name = image
    if isinstance(image, Mapping) and image.get("bytes") is None:
        name = image.get("path")
    if isinstance(name, str) and name[:5].lower() != "data:":
        raise ValueError(
            "in a message, no text names a file or an address to open: give an image as bytes, a data: URL, "
            "a PIL image, an array or a pathlib.Path"
        )
    if isinstance(image, (list, tuple)):
        raise ValueError("a part of a message holds one image, got a list; write a part for each")
