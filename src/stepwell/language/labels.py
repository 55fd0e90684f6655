"""A prompt -> token ids and labels, with any fast tokenizer: the one tokenisation of asking and of training.

Text is tokenised in one go between images, each stretch on its own as LLaVA does. An image's tokens are given
as ids, and a special token that somebody spelled out in a message stays the text it is. A token is supervised
when its characters are; the space before its word does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from stepwell.language.messages import IMAGE
from stepwell.language.prompt import Piece, Prompt, Span
from stepwell.language.tokenizer import special_tokens
from stepwell.structures import TokenLayout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE", "LabelledTokens", "label_tokens", "separator_tokens", "tokens_of_image"]

IGNORE = -100
"""The label of a token outside the loss."""


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    input_ids: list[int]
    labels: list[int]  # the same ids, or IGNORE


def label_tokens(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, image_tokens: Sequence[Sequence[int]]
) -> LabelledTokens:
    """Ids and labels of a prompt; `image_tokens` holds the ids that stand for each image.

    Raises ValueError where images and placeholders differ in number (naming both), and for a tokenizer that
    cannot tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer")
    if len(image_tokens) != prompt.num_images:
        raise ValueError(f"{prompt.num_images} {IMAGE} placeholders for {len(image_tokens)} images")
    ids, labels = [], []
    for token, start, end in _tokens(prompt, tokenizer, iter(image_tokens)):
        supervised = any(first <= start and end <= last for first, last in prompt.supervised)
        ids.append(token)
        labels.append(token if supervised else IGNORE)
    return LabelledTokens(ids, labels)


def separator_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A separator's ids as they stand inside of a text."""
    return [token for token, _, _ in _encode(text, tokenizer, inside=True)]


def tokens_of_image(
    layout: TokenLayout, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> list[int]:
    """The ids that stand for an image: a placeholder for every visual token, and separators.

    Raises ValueError for the id of a separator that is none of the tokenizer's, or the placeholder's.
    """
    for separator in {run.ids for run in layout.runs if run.ids}:
        if not 0 <= min(separator) <= max(separator) < len(tokenizer) or image_token_id in separator:
            raise ValueError(
                f"the separator {list(separator)} stands for no word of this tokenizer, which has "
                f"{len(tokenizer)}; give it as text, or with the tokenizer that it is of"
            )
    texts = {run.text for run in layout.runs if run.text is not None}
    separators = {text: separator_tokens(text, tokenizer) for text in texts}
    ids: list[int] = []
    for run in layout.runs:
        ids += [image_token_id] * run.count if run.text is None else separators[run.text]
        ids += run.ids or ()
    return ids


def _tokens(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, image_tokens: Iterator[Sequence[int]]
) -> Iterator[tuple[int, int, int]]:
    """(id, start, end) of each token of a prompt, in characters."""
    special, start = special_tokens(tokenizer), 0
    for apart, group in groupby(prompt.pieces, key=lambda piece: piece.kind in ("image", "token")):
        pieces = list(group)
        stretch = start
        for piece in pieces:
            end = start + len(piece.text)
            if piece.kind == "image":
                yield from ((token, start, end) for token in next(image_tokens))
            elif piece.kind == "token":
                yield tokenizer.convert_tokens_to_ids(piece.text), start, end
            start = end
        for first, last in () if apart else _parts(pieces, special):
            text, offset = prompt[stretch + first : stretch + last], stretch + first
            for token, at, to in _encode(text, tokenizer, inside=first > 0):
                yield token, offset + at, offset + to


def _parts(pieces: Sequence[Piece], special: re.Pattern[str]) -> Iterator[Span]:
    """What of a stretch is tokenised in one go: special tokens that people spelled out are cut in two."""
    start = position = 0
    for is_frame, group in groupby(pieces, key=lambda piece: piece.kind == "frame"):
        text = "".join(piece.text for piece in group)
        for match in () if is_frame else re.finditer(f"(?={special.pattern})", text):
            cut = position + match.start() + 1
            yield start, cut
            start = cut
        position += len(text)
    if start < position:
        yield start, position


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, inside: bool) -> Iterator[tuple[int, int, int]]:
    """(id, start, end) of each token, in characters of its word.

    inside: without the space that some tokenizers put in front of a text.
    """
    for before in ("\n", "a", "") if inside else ("",):  # what the text follows, and must not merge with
        head, whole = (
            tokenizer(
                part,
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,  # the processor knows about length
            )
            for part in (before, before + text)
        )
        skipped = len(head.input_ids)
        if whole.input_ids[:skipped] == head.input_ids:
            break
    for token, span in zip(whole.input_ids[skipped:], whole.offset_mapping[skipped:], strict=True):
        start, end = (place - len(before) for place in span)
        if start == end:  # byte-level tokenizers leave the space out of a token's offsets, here all there is
            start, end = max(start - 1, 0), max(end, 1)
        word = text[start:end].lstrip()
        yield token, end - len(word) if word else start, end
