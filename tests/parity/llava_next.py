"""What LLaVA-NeXT supervises beside answers: the header in front of each, some tokens wherever they stand.

Its newline is the *token* of one newline, which tokenizers use where no newline stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stepwell.language.messages import Message
from stepwell.language.prompt import Prompt, render

__all__ = ["NEXT_TOKENS", "render_next"]

NEXT_TOKENS = {
    "llama3_next": (
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen": ("<|im_start|>assistant\n", "<|im_start|>", "<|im_end|>", "\n"),
}


def render_next(messages: Sequence[Message], template: str, tokenizer: Any = None) -> Prompt:
    """As `render`, with the mask of the official code."""
    prompt = render(messages, template, tokenizer)
    frames = "".join(
        piece.text if piece.kind in ("frame", "token") else "\0" * len(piece.text) for piece in prompt.pieces
    )
    marks = bytearray(len(prompt))
    spans = list(prompt.supervised)
    for token in NEXT_TOKENS[template]:
        pattern, text = (r"(?<!\n)\n(?!\n)", prompt) if token == "\n" else (re.escape(token), frames)
        spans += [match.span() for match in re.finditer(pattern, text)]
    for start, end in spans:
        marks[start:end] = b"\1" * (end - start)
    return Prompt(prompt.pieces, [match.span() for match in re.finditer(b"\1+", marks)])
