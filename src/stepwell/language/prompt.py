"""Messages -> a prompt that knows what people wrote, where images stand and what is supervised.

transformers renders our templates and a tokenizer's own alike; a question alone, in one of ours, is rendered
without it, since importing it takes longer than the answer. Official code finds the supervised text by
counting tokens of substrings, which is right for particular tokenizers only and masks whole conversations
silently for the others; here every character knows whether it is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from stepwell.language.characters import well_formed
from stepwell.language.messages import IMAGE, Message, with_texts
from stepwell.language.template import TEMPLATES, Template, find_template, template_of, write_content
from stepwell.language.tokenizer import added_tokens, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Piece", "PieceKind", "Prompt", "Span", "plain_prompt", "render", "write_message"]

PieceKind = Literal["frame", "question", "answer", "image", "token"]
Span = tuple[int, int]
"""[start, end) in characters."""

_MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters, which Unicode leaves to programs
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_READS_PARTS = re.compile(r"\bfor\s+\w+\s+in\s[^%]*\bcontent\b")


class Piece(NamedTuple):
    """A stretch of a prompt.

    "frame" is the template's own text, "question" and "answer" what people wrote (special tokens spelled out
    in there are only text), "image" a placeholder. A "token" stands apart: the text behind it starts afresh.
    """

    text: str
    kind: PieceKind


class Prompt(str):
    """A text that carries its pieces, and which of its characters are supervised.

    Being a `str`, it is handed on unchanged by whoever takes a rendered conversation; what is cut from it or
    joined to it is an ordinary string.
    """

    pieces: tuple[Piece, ...]
    supervised: tuple[Span, ...]

    def __new__(cls, pieces: Iterable[Piece], supervised: Iterable[Span] = ()) -> Prompt:
        pieces = tuple(piece for piece in pieces if piece.text)
        prompt = super().__new__(cls, "".join(piece.text for piece in pieces))
        prompt.pieces, prompt.supervised = pieces, tuple(supervised)
        return prompt

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.pieces, self.supervised

    @property
    def num_images(self) -> int:
        return sum(piece.kind == "image" for piece in self.pieces)


def render(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> Prompt:
    """Messages -> a prompt in a chat template: the name of one of ours, or Jinja.

    The tokenizer lends its special tokens; ours write its BOS where it writes one by itself. Supervised is
    what the template marks with `{% generation %}`, else each answer with the special token behind it.
    variables are the template's.

    Raises ValueError for a conversation that the template refuses, an unknown template, special tokens that
    the tokenizer lacks, and a template that changes what people wrote.
    """
    ours = template_of(template) if "{" in template else find_template(template)
    special = {} if tokenizer is None else _special_variables(tokenizer, ours)
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "a generation prompt asks for an answer, continue_final_message goes on with one; give one"
        )
    jinja = template if ours is None else ours.jinja
    variables = {
        **special,
        **variables,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    messages = [with_texts(message, well_formed) for message in messages]
    text, _ = _write(messages, jinja, **variables)
    # Written once more with marks around texts: what lies outside of them is the template's own.
    question, answer, end = marks = [mark for mark in _MARKS if mark not in text][:3]
    marked_messages = [
        with_texts(message, partial(_mark, answer if message["role"] == "assistant" else question, end))
        for message in messages
    ]
    marked, generated = _write(marked_messages, jinja, **variables)
    pieces = list(_unmark(marked, {question: "question", answer: "answer"}, end))
    if "".join(piece.text for piece in pieces) != text:
        raise ValueError(
            "the chat template changes what people wrote, so supervised text cannot be told apart; "
            f"choose one of ours: {', '.join(sorted(TEMPLATES))}"
        )
    if generated is None:
        supervised = list(_answers(pieces, text, special_tokens(tokenizer)))
    else:
        unmarked = str.maketrans(dict.fromkeys(marks))
        lengths = [[len(marked[:edge].translate(unmarked)) for edge in span] for span in generated]
        supervised = [(start, end) for start, end in lengths]
    bos = special.get("bos_token")
    if ours is not None and bos and text.startswith(bos):
        pieces[:1] = [Piece(bos, "token"), Piece(pieces[0].text.removeprefix(bos), "frame")]
    return Prompt(pieces, _joined(supervised))


def plain_prompt(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> Prompt:
    """What somebody wrote as a whole: special tokens spelled out in it are meant, `<image>` is an image.

    add_special_tokens: those that the tokenizer adds to a text stand around it, but no second BOS.
    """
    text = well_formed(text)
    before, after = added_tokens(tokenizer) if add_special_tokens else ([], [])
    if before and text.startswith(before[0]):
        before = []
    parts = [Piece(part, "image" if part == IMAGE else "frame") for part in re.split(f"({IMAGE})", text)]
    return Prompt([*(Piece(t, "token") for t in before), *parts, *(Piece(t, "token") for t in after)])


def write_message(message: Message) -> str:
    """The content of a message as our templates write it: one text, `<image>` for each of its images.

    Raises ValueError for content that has no place in such a message.
    """
    return _write([message], write_content())[0]


def _special_variables(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> dict[str, Any]:
    """The tokenizer's special tokens as variables of a template."""
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    if template is not None:
        lacking = {token for token in template.special if not special_tokens(tokenizer).fullmatch(token)}
        if lacking and (lacking := lacking - tokenizer.get_added_vocab().keys()):
            raise ValueError(
                f"the tokenizer has no {', '.join(sorted(lacking))}; add them, or choose the chat template "
                "of this model"
            )
        if special.get("bos_token") not in added_tokens(tokenizer)[0]:
            special.pop("bos_token", None)
    return special


def _write(messages: Sequence[Message], jinja: str, **variables: Any) -> tuple[str, Sequence[Span] | None]:
    """The text, and what the template marks as generated; None if it marks nothing."""
    if not _READS_PARTS.search(jinja):
        messages = [_as_text(message) for message in messages]
    marks_answers = _GENERATION.search(jinja) is not None
    ours = template_of(jinja)
    has_answers = any(message["role"] == "assistant" for message in messages)
    try:
        if ours is not None and not has_answers and not variables.get("continue_final_message"):
            return ours.write(messages=messages, **variables), []
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, generated = render_jinja_template(
            conversations=[messages],
            chat_template=jinja,
            return_assistant_tokens_mask=marks_answers,
            **variables,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], generated[0] if marks_answers else None


def _as_text(message: Message) -> Message:
    """For a template that takes no parts: content as ours write it."""
    return {**message, "content": write_message(message)} if "content" in message else message


def _mark(start: str, end: str, text: str) -> str:
    """White space at the ends stays outside of the marks, for templates that look at it."""
    core = text.strip()
    return text.replace(core, f"{start}{core}{end}", 1) if core else text


def _unmark(marked: str, kinds: Mapping[str, PieceKind], end: str) -> Iterator[Piece]:
    """The pieces between, and in, the marks."""
    position = 0
    for match in re.finditer(f"[{''.join(kinds)}](.*?){end}|{IMAGE}", marked, re.DOTALL):
        yield Piece(marked[position : match.start()], "frame")
        yield Piece(IMAGE, "image") if match[0] == IMAGE else Piece(match[1], kinds[match[0][0]])
        position = match.end()
    yield Piece(marked[position:], "frame")


def _answers(pieces: Sequence[Piece], text: str, special: re.Pattern[str]) -> Iterator[Span]:
    """Answers, each with the white space and the special token right behind it."""
    ending = re.compile(rf"\s*(?:{special.pattern})?")
    start = 0
    for piece in pieces:
        end = start + len(piece.text)
        if piece.kind == "answer" and (match := ending.match(text, end)):
            yield start, match.end()
        start = end


def _joined(spans: Iterable[Span]) -> list[Span]:
    """In order, overlapping and adjacent ones as one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif start < end:
            joined.append((start, end))
    return joined
