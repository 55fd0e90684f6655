"""Conversations as LLaVA's training files hold them -> messages.

LLaVA-1.5 (arXiv 2310.03744) puts the image in front of the question, wherever its placeholder stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from stepwell.language.messages import IMAGE, Message

__all__ = ["PlaceholderRule", "from_llava", "move_placeholder"]

PlaceholderRule = Literal["llava", "llava_next"]


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
    conversations: Sequence[Mapping[str, str]], *, has_image: bool, rule: PlaceholderRule = "llava"
) -> list[Message]:
    """[{"from": "human" | "gpt", "value": text}] of a LLaVA training file -> messages.

    One leading answer is dropped, as in the official code; placeholders are moved by `rule`. Without an
    image, `<image>` is text like any other. Raises ValueError for any other speaker.
    """
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages: list[Message] = []
    for i, turn in enumerate(conversations):
        role, text = roles.get(turn["from"]), turn["value"]
        if role is None:
            raise ValueError(f"turn {i} is from {turn['from']!r}; expected one of {', '.join(roles)}")
        if role == "user" and has_image:
            messages.append({"role": role, "content": move_placeholder(text, rule)})
        else:
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    return messages[1:] if messages and messages[0]["role"] == "assistant" else messages
