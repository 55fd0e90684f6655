"""What a tokenizer does beside cutting text: the special tokens it knows, and those it adds."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["added_tokens", "special_tokens"]


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """A pattern of the strings that the tokenizer turns into special tokens, longest first."""
    if tokenizer is None:
        return re.compile("(?!)")
    return _special_tokens(tokenizer, len(tokenizer), *tokenizer.all_special_tokens)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer writes before and behind a text by itself."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    tokens, mask = tokenizer.convert_ids_to_tokens(encoded.input_ids), encoded.special_tokens_mask
    return tokens[: mask.index(0)], tokens[len(mask) - mask[::-1].index(0) :]


@lru_cache(maxsize=16)  # asking takes longer than rendering, where thousands of tokens were added
def _special_tokens(tokenizer: PreTrainedTokenizerBase, *changes_with_them: object) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    texts = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
