"""Small tokenizers of three families: SentencePiece as in LLaMA, byte-level BPE with and without BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[1] / "parity" / "inf" / "conversations.json"
OURS = {"chatml_direct_official_mpt": "chatml_direct", "qwen_next": "qwen"}  # where names differ


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


def llama_like(prepend_scheme: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def byte_level(special: list[str], bos: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
    legacy, modern = llama_like("always"), llama_like("first")
    llama_3 = byte_level(
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>"
    )
    qwen = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None)
    return {
        "plain": llama_3,
        "vicuna_v1": legacy,
        "llama_2": modern,
        "llama3_inf": llama_3,
        "llama3_next": llama_3,
        "chatml_direct": qwen,
        "qwen": qwen,
        "qwen2_5": qwen,
    }
