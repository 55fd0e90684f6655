"""What a tokenizer knows and adds."""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerFast

from stepwell.language.tokenizer import added_tokens, special_tokens

Tokenizers = dict[str, PreTrainedTokenizerFast]


def test_special_tokens_are_those_of_the_moment_and_no_other_added_ones(tokenizers: Tokenizers) -> None:
    tokenizer = copy.deepcopy(tokenizers["qwen"])
    pattern = special_tokens(tokenizer)
    assert pattern.findall("a<|im_end|><|new|>0.5<image>") == ["<|im_end|>", "<image>"]
    tokenizer.add_tokens(["0.5"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>", "<|new|>er"]})
    assert special_tokens(tokenizer).findall("0.5<|new|>er<|new|>") == ["<|new|>er", "<|new|>"]
    assert special_tokens(None).search("<|im_end|>") is None


def test_added_tokens_are_what_a_tokenizer_writes_around_a_text(families: Tokenizers) -> None:
    assert added_tokens(families["sentencepiece, new"]) == (["<s>"], [])
    assert added_tokens(families["tiktoken"]) == (["<|begin_of_text|>"], [])
    assert added_tokens(families["byte-level"]) == added_tokens(families["reader"]) == ([], [])
