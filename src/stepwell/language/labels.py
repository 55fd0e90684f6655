"""A rendered prompt -> token ids and labels, with any fast tokenizer.

A token is supervised when its characters lie in supervised text; the space before its word does not count.
Text is tokenised in one go between pictures, each stretch on its own as LLaVA does, with two exceptions: a
picture's tokens are given as ids, and a special token that somebody spelled out in a message stays the text
it is.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from stepwell.language.prompt import (
    IMAGE,
    TEMPLATES,
    Message,
    Piece,
    PieceKind,
    Rendered,
    content_pieces,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE", "LabelledTokens", "label_tokens", "render_with_tokenizer"]

IGNORE = -100
"""The label of a token outside the loss."""


_MARK = "\ue000{}\ue001"  # stands for a text; from Unicode's private use area


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    input_ids: list[int]
    labels: list[int]  # the same ids, or IGNORE


def label_tokens(
    rendered: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[Sequence[int]] | None = None,
) -> LabelledTokens:
    """Ids and labels of a prompt; `image_tokens` holds the ids that stand for each picture.

    Without `image_tokens` a picture is one `<image>` token. Warns when a conversation leaves nothing to
    learn. Raises ValueError where pictures and placeholders differ in number (naming both), where the
    tokenizer lacks a special token of the template, or cannot tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer")
    needed = {piece.text for piece in rendered.pieces if piece.kind == "special"}
    if image_tokens is None:
        needed |= {IMAGE} if rendered.num_images else set()
        image_tokens = [[tokenizer.convert_tokens_to_ids(IMAGE)]] * rendered.num_images
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if lacking := sorted(needed - known):
        raise ValueError(
            f"the tokenizer has no {', '.join(lacking)}; add them, or choose the chat template of this model"
        )
    if len(image_tokens) != rendered.num_images:
        raise ValueError(f"{rendered.num_images} {IMAGE} placeholders for {len(image_tokens)} pictures")
    ids: list[int] = []
    labels: list[int] = []
    if rendered.add_bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE)
    pictures = iter(image_tokens)
    for is_image, group in groupby(rendered.pieces, key=lambda piece: piece.kind == "image"):
        if is_image:
            found = [token for _ in group for token in next(pictures)]
            ids += found
            labels += [IGNORE] * len(found)
        else:
            for token, supervised in _tokenise(list(group), tokenizer):
                ids.append(token)
                labels.append(token if supervised else IGNORE)
    if not rendered.is_open and all(label == IGNORE for label in labels):
        warnings.warn("no token of this conversation is supervised: nothing is learned from it", stacklevel=2)
    return LabelledTokens(ids, labels)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern of the strings that the tokenizer turns into special tokens, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def _tokenise(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, bool]]:
    """(id, supervised) of each token of a stretch without pictures."""
    text, spans = "".join(piece.text for piece in pieces), Rendered(tuple(pieces)).spans
    for start, end, spelled_out in _cut(pieces, _special_tokens(tokenizer)):
        encoded = tokenizer(
            text[start:end],
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=spelled_out,
            verbose=False,  # the processor knows about length
        )
        for token, (first, last) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            yield token, _is_supervised(text, start + first, start + last, spans)


def _cut(pieces: Sequence[Piece], special: re.Pattern[str]) -> Iterator[tuple[int, int, bool]]:
    """[start, end) of the parts to tokenise, and whether the part is a special token that people spelled
    out."""
    done = position = 0
    for is_text, group in groupby(pieces, key=lambda piece: piece.kind == "text"):
        text = "".join(piece.text for piece in group)
        for match in special.finditer(text) if is_text else ():
            start, end = position + match.start(), position + match.end()
            if done < start:
                yield done, start, False
            yield start, end, True
            done = end
        position += len(text)
    if done < position:
        yield done, position, False


def _is_supervised(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    if start == end:  # byte-level tokenizers leave the space out of a token's offsets, here all there is
        start, end = max(start - 1, 0), max(end, 1)
    word = text[start:end].lstrip()
    start = end - len(word) if word else start
    return any(first <= start and end <= last for first, last in spans)


def render_with_tokenizer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Rendered:
    """Messages -> a prompt in the tokenizer's own chat template, for models that use none of ours.

    Supervised is what the template marks with `{% generation %}`, else each answer with the special token
    after it. Raises ValueError where there is no chat template, or one that changes what people wrote.
    """
    ours = ", ".join(sorted(TEMPLATES))
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer has no chat template; choose one of ours: {ours}")
    contents = [_checked_content(message) for message in messages]
    direct, _ = _apply(tokenizer, messages, contents, add_generation_prompt)
    # The template is run once more with marks in place of texts: what lies between the marks is its own text.
    marks = map(_MARK.format, itertools.count())
    marked = [
        [replace(piece, text=next(marks)) if piece.kind == "text" else piece for piece in pieces]
        for pieces in contents
    ]
    frames, learned = _apply(tokenizer, messages, marked, add_generation_prompt)
    for trim in (False, True):
        texts = _texts_by_mark(messages, contents, marked, trim=trim)
        pieces = list(_unmark(frames, learned, texts, _special_tokens(tokenizer)))
        if "".join(piece.text for piece in pieces) == direct:
            return Rendered(tuple(pieces), is_open=add_generation_prompt)
    raise ValueError(
        "the tokenizer's chat template changes what people wrote, so supervised text cannot be told apart; "
        f"choose one of ours: {ours}"
    )


def _checked_content(message: Message) -> list[Piece]:
    pieces = content_pieces(message["content"], pictures=message["role"] == "user")
    if message["role"] == "assistant" and not "".join(piece.text for piece in pieces).strip():
        raise ValueError("an assistant message is empty; drop the sample, or leave the message out")
    return pieces


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    contents: Sequence[Sequence[Piece]],
    add_generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]] | None]:
    """The tokenizer's template with `contents`, and what it marks as generated, None if it marks nothing."""
    written = [
        {**message, "content": "".join(piece.text for piece in pieces)}
        for message, pieces in zip(messages, contents, strict=True)
    ]
    template = tokenizer.get_chat_template()
    marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    try:
        texts, generated = render_jinja_template(
            conversations=[written],
            chat_template=template,
            return_assistant_tokens_mask=marks_answers,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    return texts[0], generated[0] if marks_answers else None


def _texts_by_mark(
    messages: Sequence[Message],
    contents: Sequence[Sequence[Piece]],
    marked: Sequence[Sequence[Piece]],
    *,
    trim: bool,
) -> dict[str, tuple[str, bool]]:
    """Mark -> the text it stands for, and whether it is an answer."""
    texts = {}
    for message, pieces, marks in zip(messages, contents, marked, strict=True):
        for i, (piece, mark) in enumerate(zip(pieces, marks, strict=True)):
            if piece.kind == "image":
                continue
            text = piece.text
            if trim:
                text = text.lstrip() if i == 0 else text
                text = text.rstrip() if i == len(pieces) - 1 else text
            texts[mark.text] = (text, message["role"] == "assistant")
    return texts


def _unmark(
    frames: str,
    learned: Sequence[tuple[int, int]] | None,
    texts: Mapping[str, tuple[str, bool]],
    special: re.Pattern[str],
) -> Iterator[Piece]:
    """The marked text as pieces, texts in place of their marks.

    `learned` are its supervised characters; without them answers are, and the special token right after one.
    """
    token = re.compile(f"({_MARK.format(r'[0-9]+')}|{IMAGE}|{special.pattern})")
    edges = sorted({0, len(frames), *itertools.chain.from_iterable(learned or ())})
    after_answer = False
    for start, end in itertools.pairwise(edges):
        for part in filter(None, token.split(frames[start:end])):
            text, is_answer = texts.get(part, (part, False))
            is_special = special.fullmatch(part) is not None
            supervised = is_answer or (after_answer and (is_special or part.isspace()))
            if learned is not None:
                supervised = any(first <= start and end <= last for first, last in learned)
            kind: PieceKind = "image" if part == IMAGE else "special" if is_special else "frame"
            if text:
                yield Piece(text, "text" if part in texts else kind, supervised)
            after_answer = is_answer or (after_answer and part.isspace())
