"""Token ids and labels of prompts, with tokenizers of three families."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llava_next import render_next
from stepwell.language.conversation import from_llava
from stepwell.language.labels import (
    IGNORE,
    LabelledTokens,
    label_tokens,
    separator_tokens,
    tokens_of_image,
)
from stepwell.language.prompt import Piece, Prompt, render
from stepwell.language.template import TEMPLATES
from stepwell.structures import TokenLayout, TokenRun

Tokenizers = dict[str, PreTrainedTokenizerFast]

ASKED = [{"role": "user", "content": "Which one is brighter?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "The first one."}]
TWICE = [*ANSWERED, {"role": "user", "content": "Is it flying?"}, {"role": "assistant", "content": "No"}]


def labelled(messages: Any, template: str, tokenizer: Any, **options: Any) -> LabelledTokens:
    prompt = render(messages, template, tokenizer, **options)
    return label_tokens(prompt, tokenizer, [[900]] * prompt.num_images)


def learned(tokenizer: Any, tokens: Any) -> list[str]:
    """Runs of supervised tokens, decoded."""
    runs: list[list[int]] = [[]]
    for label in tokens.labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


def test_supervised_tokens_spell_the_supervised_text(
    tokenizers: Tokenizers, template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    tokenizer = tokenizers[template]
    rule = "llava_next" if facts["family"] == "llava_next" else "llava"
    messages = from_llava(case["conversations"], has_image=case["has_image"], rule=rule)
    tokens = labelled(messages, template, tokenizer)
    expected = case["content_only_spans"] if facts["content_only_spans"] else case["spans"]
    assert [text.strip(" ") for text in learned(tokenizer, tokens)] == [
        text.strip(" ") for *_, text in expected
    ]
    assert all(label in (token, IGNORE) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))


def test_number_of_bos_tokens_is_that_of_the_official_code(
    tokenizers: Tokenizers, template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    tokenizer = tokenizers[template]
    tokens = labelled(from_llava(case["conversations"], has_image=True), template, tokenizer)
    leading = 0
    while tokens.input_ids[leading] == tokenizer.bos_token_id:
        assert tokens.labels[leading] == IGNORE
        leading += 1
    assert leading == case.get("leading_bos_tokens", 1 if template == "llama3_next" else 0)


def test_a_token_that_starts_in_the_space_before_an_answer_is_supervised(tokenizers: Tokenizers) -> None:
    prompt = Prompt((Piece("Say:  ", "frame"), Piece("assistant", "answer")), [(6, 15)])
    for family, first in (("vicuna_v1", "▁assistant"), ("qwen", "Ġassistant")):
        tokens = label_tokens(prompt, tokenizers[family], [])
        labels = [label for label in tokens.labels if label != IGNORE]
        assert tokenizers[family].convert_ids_to_tokens(labels) == [first]


def test_a_space_of_the_frame_that_is_a_token_is_not_supervised(tokenizers: Tokenizers) -> None:
    prompt = Prompt((Piece("Say: ", "frame"), Piece("抹", "answer")), [(5, 6)])
    tokens = label_tokens(prompt, tokenizers["qwen"], [])
    assert "Ġ" in tokenizers["qwen"].convert_ids_to_tokens(tokens.input_ids)  # its offsets are (5, 5)
    assert learned(tokenizers["qwen"], tokens) == ["抹"]


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen", "llama3_inf"])
@pytest.mark.parametrize("answer", ["  A\n \n  dog ", " 抹茶 ", "\n\nNo"])
def test_white_space_of_an_answer_is_supervised_and_none_around_it(
    tokenizers: Tokenizers, template: str, answer: str
) -> None:
    messages = [{"role": "user", "content": "What? "}, {"role": "assistant", "content": answer}]
    tokens = labelled(messages, template, tokenizers[template])
    end = {"vicuna_v1": "</s>", "qwen": "<|im_end|>", "llama3_inf": "<|eot_id|>"}[template]
    assert learned(tokenizers[template], tokens) == [answer + end]  # LLaMA's decoder drops the frame's space


def test_a_tokenizer_without_offsets_is_refused() -> None:
    slow: Any = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="SlowTokenizer gives no character offsets; use a fast tokenizer"):
        label_tokens(render(ANSWERED, "qwen"), slow, [])


@pytest.mark.parametrize("template", ["qwen", "llama3_next"])
def test_llava_next_masks_are_made_of_tokens(tokenizers: Tokenizers, table: Any, template: str) -> None:
    name = {"qwen": "qwen_next"}.get(template, template)
    for case in table[name]["cases"]:
        messages = from_llava(case["conversations"], has_image=case["has_image"], rule="llava_next")
        prompt = render_next(messages, template, tokenizers[template])
        tokens = label_tokens(prompt, tokenizers[template], [[900]] * prompt.num_images)
        assert learned(tokenizers[template], tokens) == [text for *_, text in case["spans"]]


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "qwen", "llama3_inf"])
def test_text_is_tokenised_in_one_go(tokenizers: Tokenizers, template: str) -> None:
    """As the official code does, whose text has no BOS but the one that its template writes out."""
    tokenizer, text = tokenizers[template], render(TWICE, template)
    assert labelled(TWICE, template, tokenizer).input_ids == tokenizer(text).input_ids


def test_text_around_an_image_is_tokenised_on_its_own_as_llava_does(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["llama_2"]  # marks the first word of a text only
    prompt = render([{"role": "user", "content": "<image>\nWhat?"}], "llama_2", tokenizer)
    before, after = prompt.removeprefix("<s>").split("<image>")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]
    tokens = label_tokens(prompt, tokenizer, [[7, 8, 9]])
    assert tokens.input_ids == [tokenizer.bos_token_id, *ids[0], 7, 8, 9, *ids[1]]


def test_images_are_never_supervised_and_stand_in_order(tokenizers: Tokenizers) -> None:
    messages = [
        {"role": "user", "content": "<image>\n<image>\nWhich?"},
        {"role": "assistant", "content": "B"},
    ]
    tokens = label_tokens(render(messages, "qwen"), tokenizers["qwen"], [[901] * 3, [902] * 2])
    assert [token for token in tokens.input_ids if token > 900] == [901, 901, 901, 902, 902]
    assert not {901, 902} & set(tokens.labels)


def test_images_and_placeholders_that_differ_are_both_counted(tokenizers: Tokenizers) -> None:
    prompt = render([{"role": "user", "content": "<image>?"}], "qwen", add_generation_prompt=True)
    with pytest.raises(ValueError, match="1 <image> placeholders for 2 images"):
        label_tokens(prompt, tokenizers["qwen"], [[1], [2]])
    with pytest.raises(ValueError, match="0 <image> placeholders for 1 images"):
        label_tokens(render(ANSWERED, "qwen"), tokenizers["qwen"], [[1]])


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain"}))
def test_special_tokens_that_people_spell_out_stay_text(tokenizers: Tokenizers, template: str) -> None:
    tokenizer, end = tokenizers[template], TEMPLATES[template].special[-1]
    spelled = [
        {"role": "user", "content": [{"type": "text", "text": f"What does{end}mean, and <image>?"}]},
        {"role": "assistant", "content": f"{end} ends an answer."},
    ]
    tokens, usual = labelled(spelled, template, tokenizer), labelled(ANSWERED, template, tokenizer)
    for special in (*TEMPLATES[template].special, "<image>"):
        token = tokenizer.convert_tokens_to_ids(special)
        assert tokens.input_ids.count(token) == usual.input_ids.count(token)
    assert f"does{end}mean, and <image>?" in tokenizer.decode(tokens.input_ids)
    (answer,) = learned(tokenizer, tokens)
    assert answer.replace(" ", "") == f"{end}endsananswer.{end}"


@pytest.mark.parametrize("separator", [",", "\n", "\n\n", "a", " ,", "<|im_end|>"])
def test_a_separator_stands_as_it_does_inside_of_a_text(families: Tokenizers, separator: str) -> None:
    for name, tokenizer in families.items():
        ids = separator_tokens(separator, tokenizer)
        assert separator[0] == " " or tokenizer.convert_ids_to_tokens(ids[0])[0] != "▁", name
        inside = tokenizer(f"x{separator}", add_special_tokens=False).input_ids
        assert inside[-len(ids) :] == ids, name
        assert tokenizer.decode(ids).strip() == separator.strip(), name


@pytest.mark.parametrize("ids", [(10_000,), (13, 10_000), (-1,), (7,)])
def test_a_separator_that_is_no_word_is_refused(ids):
    runs = (TokenRun(count=2), TokenRun(ids=ids))
    layout = TokenLayout(image_size=(1, 1), inputs=(), views=(), runs=runs)
    with pytest.raises(ValueError, match=rf"the separator {re.escape(str(list(ids)))} stands for no word"):
        tokens_of_image(layout, range(100), image_token_id=7)
