"""Small tokenizers of every family, with the recorded conversations as their corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stepwell.reader.tokenizer import build_reader_tokenizer

GOLDEN = Path(__file__).parents[1] / "parity" / "inf" / "conversations.json"
OURS = {"chatml_direct_official_mpt": "chatml_direct", "qwen_next": "qwen"}  # where names differ
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@pytest.fixture(scope="session")
def table() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def golden_cases() -> list[Any]:
    """(our template, facts, case) of every recorded conversation."""
    table = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return [
        pytest.param(OURS.get(name, name), facts, case, id=f"{name}-{case['id']}")
        for name, facts in table["settings"]["templates"].items()
        for case in table[name]["cases"]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"template", "facts", "case"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("template", "facts", "case"), golden_cases())


def corpus() -> list[str]:
    table = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return [case["prompt"] for name in table["settings"]["templates"] for case in table[name]["cases"]]


def sentencepiece(prepend: str, *more: str) -> PreTrainedTokenizerFast:
    """As LLaMA's. prepend: "always" or "first", of Metaspace; "normalizer" as in the files of LLaMA 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prepend == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        word = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(word)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    special = ["<unk>", "<s>", "</s>", *more]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", *more],
    )


def byte_level(special: list[str], bos: str | None, *, tiktoken: bool = False) -> PreTrainedTokenizerFast:
    """As Qwen's, or with a BOS as LLaMA 3's. tiktoken: split by a pattern, words looked up whole first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=tiktoken))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if tiktoken:
        split = pre_tokenizers.Split(Regex(TIKTOKEN), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos is not None:
        add_bos = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), add_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, additional_special_tokens=["<image>", *special]
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Template -> a tokenizer that has its special tokens and its habits."""
    legacy, modern = sentencepiece("always"), sentencepiece("first")
    llama_3 = byte_level(LLAMA_3, "<|begin_of_text|>")
    qwen = byte_level(CHATML, None)
    return {
        "plain": llama_3,
        "vicuna_v1": legacy,
        "llama_2": modern,
        "mistral": modern,
        "llama3_inf": llama_3,
        "llama3": llama_3,
        "llama3_next": llama_3,
        "chatml_direct": qwen,
        "qwen": qwen,
        "qwen2_5": qwen,
    }


@pytest.fixture(scope="session")
def families() -> dict[str, PreTrainedTokenizerFast]:
    """Family -> a tokenizer that has the special tokens of all templates."""
    special = [*LLAMA_3, *CHATML]
    reader = build_reader_tokenizer()
    reader.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", *LLAMA_3]})
    return {
        "sentencepiece, old files": sentencepiece("normalizer", *special),
        "sentencepiece, old": sentencepiece("always", *special),
        "sentencepiece, new": sentencepiece("first", *special),
        "byte-level": byte_level([*special, "<s>", "</s>"], None),
        "byte-level with BOS": byte_level([*special, "<s>", "</s>"], "<|begin_of_text|>"),
        "tiktoken": byte_level([*special, "<s>", "</s>"], "<|begin_of_text|>", tiktoken=True),
        "reader": reader,
    }
