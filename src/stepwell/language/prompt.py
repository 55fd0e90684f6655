"""Chat templates: messages -> the text a model was trained on, and which characters of it are supervised.

The seven templates of the LLaVA family (LLaVA-1.5 arXiv 2310.03744, LLaVA-NeXT, INF-LLaVA arXiv 2407.16198)
are data: each is a handful of frames around `{}`, which `render` fills. Messages are transformers':
{"role": "user", "content": text or [{"type": "image"}, {"type": "text", ...}]}.

Official code finds the supervised text by counting tokens of substrings, which is right for particular
tokenizers only and masks whole conversations silently for the others; here every character knows whether it
is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = [
    "IMAGE",
    "TEMPLATES",
    "ChatTemplate",
    "MaskStyle",
    "Message",
    "Piece",
    "PieceKind",
    "Rendered",
    "content_pieces",
    "find_template",
    "render",
]

IMAGE = "<image>"
"""The placeholder of one picture."""

Message = Mapping[str, Any]
MaskStyle = Literal["content", "llava_next"]
PieceKind = Literal["frame", "special", "image", "text"]

_PICTURES = ("image", "image_url")  # content types that stand for a picture


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt.

    kind: "frame" is the template's own text, "special" one special token of it, "image" a picture's
    placeholder, and "text" what people wrote: special tokens spelled out in there are only text.
    """

    text: str
    kind: PieceKind
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt; `is_open` if a generation prompt ends it, `add_bos` if the tokenizer adds its own."""

    pieces: tuple[Piece, ...]
    add_bos: bool = False
    is_open: bool = False

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Supervised characters as [start, end), neighbours joined."""
        spans: list[tuple[int, int]] = []
        start = 0
        for piece in self.pieces:
            end = start + len(piece.text)
            if piece.supervised and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif piece.supervised:
                spans.append((start, end))
            start = end
        return spans

    @property
    def num_images(self) -> int:
        return sum(piece.kind == "image" for piece in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """How one family of models writes a conversation; `{}` is where a text goes.

    The order is opening, system, then for each round user (`first_user` in round one), header, answer,
    closing. An answer with its frame is what a model learns to say; a generation prompt ends after the
    header.
    """

    name: str
    system: str  # the default system sentence
    system_frame: str
    user: str
    header: str
    answer: str
    opening: str = ""
    first_user: str | None = None  # where it differs from `user`
    closing: str = ""
    special: tuple[str, ...]  # the special tokens in these frames
    add_bos: bool = False  # the tokenizer adds its own, on top of any in `opening`
    trim: bool = False  # texts are stripped
    next_tokens: tuple[str, ...] = ()  # supervised wherever they stand in the masks of LLaVA-NeXT

    def user_frame(self, index: int) -> str:
        return self.user if index or self.first_user is None else self.first_user


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_3_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_SPECIAL = ("<|im_start|>", "<|im_end|>")

_LLAMA_3_INF = ChatTemplate(
    name="llama3_inf",
    system=_VICUNA_SYSTEM,
    opening="<|begin_of_text|>",
    system_frame="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{}<|eot_id|>",
    special=_LLAMA_3_SPECIAL,
    add_bos=True,  # released INF-LLaVA models were trained with both
)
_QWEN = ChatTemplate(
    name="qwen",
    system="You are a helpful assistant.",
    system_frame="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    answer="{}<|im_end|>",
    closing="\n",
    special=_CHATML_SPECIAL,
    next_tokens=(*_CHATML_SPECIAL, "\n"),
)
_PLAIN = ChatTemplate(
    name="plain",
    system="",
    system_frame="{}",
    user="{}",
    header="",
    answer="{}\n",
    special=(),
    add_bos=True,
)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        _PLAIN,
        ChatTemplate(
            name="vicuna_v1",
            system=_VICUNA_SYSTEM,
            system_frame="{} ",
            user="USER: {} ",
            header="ASSISTANT:",
            answer=" {}</s>",
            special=("</s>",),
            add_bos=True,
        ),
        ChatTemplate(
            name="llama_2",
            system=_LLAVA_SYSTEM,
            opening="[INST] ",
            system_frame="<<SYS>>\n{}\n<</SYS>>\n\n",
            first_user="{} [/INST]",
            user="<s>[INST] {} [/INST]",
            header="",
            answer=" {} </s>",
            special=("<s>", "</s>"),
            add_bos=True,
        ),
        _LLAMA_3_INF,
        replace(
            _LLAMA_3_INF,
            name="llama3_next",
            system=_LLAVA_SYSTEM,
            add_bos=False,
            trim=True,
            next_tokens=_LLAMA_3_SPECIAL,
        ),
        ChatTemplate(
            name="chatml_direct",
            system="Answer the questions.",
            system_frame="<|im_start|>system\n{}<|im_end|>",
            user="<|im_start|>user\n{}<|im_end|>",
            header="<|im_start|>assistant\n",
            answer="{}<|im_end|>",
            special=_CHATML_SPECIAL,
        ),
        _QWEN,
        replace(
            _QWEN,
            name="qwen2_5",
            system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        ),
    )
}
"""The templates by name; `qwen2_5` is `qwen` with the other system sentence."""


def render(
    template: str | ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    mask_style: MaskStyle = "content",
) -> Rendered:
    """Messages (an optional system message, then user and assistant in turn) -> a prompt.

    mask_style: "content" supervises answers with their end token; "llava_next" is that code's mask, which
    adds the assistant headers and some tokens wherever they stand. Raises ValueError for an unknown
    template, roles out of turn, an empty answer, a mask that the template does not have, and what `plain`
    cannot express.
    """
    chat = find_template(template)
    if mask_style == "llava_next" and not chat.next_tokens:
        known = sorted(name for name, other in TEMPLATES.items() if other.next_tokens)
        raise ValueError(f"template {chat.name!r} has no llava_next mask; only {', '.join(known)} do")
    system, turns = _turns(chat, messages, add_generation_prompt)
    pieces = list(_frame(chat, chat.opening))
    if system:
        pieces += _fill(chat, chat.system_frame, [Piece(system, "text")])
    for i, turn in enumerate(turns):
        content = _content(chat, turn)
        if turn["role"] == "user":
            pieces += _fill(chat, chat.user_frame(i), content)
        else:
            pieces += _frame(chat, chat.header, supervised=mask_style == "llava_next")
            pieces += [replace(piece, supervised=True) for piece in _fill(chat, chat.answer, content)]
            pieces += _frame(chat, chat.closing, supervised=mask_style == "llava_next")
    if add_generation_prompt:
        pieces += _frame(chat, chat.header, supervised=mask_style == "llava_next")
    if mask_style == "llava_next":
        pieces = list(_supervise_next_tokens(chat, pieces))
    return Rendered(tuple(pieces), add_bos=chat.add_bos, is_open=add_generation_prompt)


def find_template(template: str | ChatTemplate) -> ChatTemplate:
    """A template by name. Raises ValueError naming those there are."""
    if isinstance(template, ChatTemplate):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"unknown chat template {template!r}; choose from {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[template]


def _turns(
    chat: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, Sequence[Message]]:
    """System text and the turns after it, checked."""
    system, turns = chat.system, messages
    if messages and messages[0]["role"] == "system":
        system = "".join(piece.text for piece in content_pieces(messages[0]["content"], pictures=False))
        system, turns = (system.strip() if chat.trim else system), messages[1:]
    if not turns:
        raise ValueError("a conversation needs at least one user message")
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn["role"] != expected:
            raise ValueError(
                f"message {i} is by {turn['role']!r}, expected {expected!r}: "
                "user and assistant take turns, user first"
            )
    if add_generation_prompt and turns[-1]["role"] == "assistant":
        raise ValueError(
            "the conversation ends with an answer already; a generation prompt follows a user message"
        )
    if chat.name == "plain":
        _check_plain(turns, system, add_generation_prompt)
    return system, turns


def _check_plain(turns: Sequence[Message], system: str, add_generation_prompt: bool) -> None:
    if system or add_generation_prompt or len(turns) != 2:
        got = "a system message" if system else f"{len(turns)} messages"
        got = "a generation prompt" if add_generation_prompt else got
        raise ValueError(f"template 'plain' holds one picture and its caption, and nothing else; got {got}")
    if not any(piece.kind == "image" for piece in content_pieces(turns[0]["content"])):
        raise ValueError(f"template 'plain' needs a picture ({IMAGE}) in the user message")


def _content(chat: ChatTemplate, turn: Message) -> list[Piece]:
    if turn["role"] == "user":
        if chat.name == "plain":  # a caption answers no question
            return [Piece(IMAGE, "image")]
        pieces = content_pieces(turn["content"])
    else:
        pieces = content_pieces(turn["content"], pictures=False)
        if not "".join(piece.text for piece in pieces).strip():
            raise ValueError(
                "an assistant message is empty; drop the sample, or leave the message out to generate it"
            )
    return _strip(pieces) if chat.trim else pieces


def content_pieces(content: str | Sequence[Message], *, pictures: bool = True) -> list[Piece]:
    """A message's content as pieces of text and pictures.

    A plain string is cut at `<image>` unless `pictures` is False. In a list, one picture is moved to the
    front of the text, as the LLaVA family was trained; several stay where they are. Raises ValueError for
    other content.
    """
    if isinstance(content, str):
        parts = re.split(f"({IMAGE})", content) if pictures else [content]
        return [Piece(part, "image" if pictures and part == IMAGE else "text") for part in parts if part]
    for part in content:
        if part.get("type") != "text" and not (pictures and part.get("type") in _PICTURES):
            raise ValueError(f"content of type {part.get('type')!r} has no place in this message")
    texts = [part["text"] for part in content if part["type"] == "text"]
    if len(content) - len(texts) == 1:
        text = "".join(texts).strip()
        return [Piece(IMAGE, "image"), *([Piece("\n" + text, "text")] if text else [])]
    pieces = []
    for i, part in enumerate(content):
        if part["type"] == "text":
            pieces.append(Piece(part["text"], "text"))
        else:
            pieces += [Piece(IMAGE, "image"), *([Piece("\n", "text")] if i + 1 < len(content) else [])]
    return [piece for piece in pieces if piece.text]


def _strip(pieces: Sequence[Piece]) -> list[Piece]:
    """Content without white space at its ends."""
    stripped = list(pieces)
    while stripped and stripped[0].kind == "text" and stripped[0].text != (text := stripped[0].text.lstrip()):
        stripped[:1] = [Piece(text, "text")] if text else []
    while (
        stripped and stripped[-1].kind == "text" and stripped[-1].text != (text := stripped[-1].text.rstrip())
    ):
        stripped[-1:] = [Piece(text, "text")] if text else []
    return stripped


def _frame(chat: ChatTemplate, text: str, *, supervised: bool = False) -> Iterator[Piece]:
    """The template's own text, cut at its special tokens."""
    cuts = re.split("(" + "|".join(map(re.escape, chat.special)) + ")", text) if chat.special else [text]
    return (Piece(part, "special" if part in chat.special else "frame", supervised) for part in cuts if part)


def _fill(chat: ChatTemplate, frame: str, content: Sequence[Piece]) -> list[Piece]:
    before, after = frame.split("{}")
    return [*_frame(chat, before), *content, *_frame(chat, after)]


def _supervise_next_tokens(chat: ChatTemplate, pieces: Sequence[Piece]) -> Iterator[Piece]:
    """LLaVA-NeXT supervises some tokens wherever they stand.

    Its newline is the *token* of one newline, which tokenizers use for a newline that has no newline beside
    it.
    """
    lone = r"((?<!\n)\n(?!\n))" if "\n" in chat.next_tokens else "(?!)()"
    for piece in pieces:
        if piece.supervised or piece.kind == "image":
            yield piece
        elif piece.kind == "special":
            yield replace(piece, supervised=piece.text in chat.next_tokens)
        else:
            for part in filter(None, re.split(lone, piece.text)):
                yield replace(piece, text=part, supervised=part == "\n" and part in chat.next_tokens)
