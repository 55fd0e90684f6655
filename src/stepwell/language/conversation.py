"""Conversations as training files hold them -> messages.

LLaVA writes `from` and `value`, others `role` and `content`, as transformers' messages have them.

LLaVA-1.5 (arXiv 2310.03744) puts the image in front of the question, wherever its placeholder stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stepwell.language.messages import IMAGE, Message
from stepwell.language.prompt import write_message

__all__ = ["PlaceholderRule", "from_llava", "move_placeholder"]

PlaceholderRule = Literal["llava", "llava_next"]

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def move_placeholder(text: str, rule: PlaceholderRule = "llava") -> str:
    """`<image>` moved to the front of a user's text, on a line of its own.

    "llava" (LLaVA-1.5, PIIP, INF-LLaVA) makes one placeholder of all there are; "llava_next" leaves a text
    alone that has several, or starts with its one. A text without placeholder keeps its white space.
    """
    if IMAGE not in text:
        return text
    if rule == "llava_next" and (text.count(IMAGE) > 1 or text.startswith(IMAGE)):
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def from_llava(
    conversations: Sequence[Mapping[str, Any]], *, has_image: bool, rule: PlaceholderRule = "llava"
) -> list[Message]:
    """[{"from": "human" | "gpt", "value": text}] of a training file, or [{"role": ..., "content": ...}],
    whose content may be a list of parts -> messages.

    One leading answer is dropped, as in the official code; placeholders are moved by `rule`. Without an
    image, `<image>` is text like any other. Raises ValueError for any other speaker, and for what is no text.
    """
    messages: list[Message] = []
    for i, turn in enumerate(conversations):
        role, text = _read(turn, i)
        if role == "user" and has_image:
            messages.append({"role": role, "content": move_placeholder(text, rule)})
        else:
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    return messages[1:] if messages and messages[0]["role"] == "assistant" else messages


def _read(turn: Mapping[str, Any], number: int) -> tuple[str, str]:
    """The role and the text of one turn."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} is a {type(turn).__name__}, not a speaker and a text")
    speaker = turn.get("role") if turn.get("from") is None else turn["from"]
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"turn {number} is from {speaker!r}; expected one of {', '.join(_ROLES)}")
    role, text = _ROLES[speaker], turn.get("content") if turn.get("value") is None else turn["value"]
    if isinstance(text, list):
        text = write_message({"role": role, "content": text})
    if not isinstance(text, str):
        raise ValueError(f"turn {number} says {text!r}, which is no text")
    return role, text
