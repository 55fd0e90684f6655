"""Prompts against those recorded from the official code, the refusals, and templates that are not ours."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llava_next import render_next
from stepwell.language.conversation import from_llava
from stepwell.language.prompt import Piece, Prompt, _joined, plain_prompt, render
from stepwell.language.template import TEMPLATES, find_template

Tokenizers = dict[str, PreTrainedTokenizerFast]

ASKED = [{"role": "user", "content": "Why?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Because."}]
TWICE = [*ANSWERED, {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "No"}]
CHATS = sorted(set(TEMPLATES) - {"plain"})


def messages_of(facts: dict[str, Any], case: dict[str, Any]) -> list[Any]:
    rule = "llava_next" if facts["family"] == "llava_next" else "llava"
    return from_llava(case["conversations"], has_image=case["has_image"], rule=rule)


def spans(prompt: Prompt) -> list[list[Any]]:
    return [[start, end, prompt[start:end]] for start, end in prompt.supervised]


def user(*content: Any) -> list[Any]:
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    return [{"role": "user", "content": parts}]


def test_text_is_that_of_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    assert render(messages_of(facts, case), template) == case["prompt"]


def test_generation_prompt_is_that_of_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    asked = messages_of(facts, case)[:-1]
    if case["generation_prompt"] is None:
        with pytest.raises(ValueError, match="nothing else; got a generation prompt"):
            render(asked, template, add_generation_prompt=True)
    else:
        assert render(asked, template, add_generation_prompt=True) == case["generation_prompt"]


def test_answers_and_their_end_are_supervised(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    expected = case["content_only_spans"] if facts["content_only_spans"] else case["spans"]
    assert spans(render(messages_of(facts, case), template)) == expected


def test_llava_next_mask_is_that_of_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    if facts["family"] == "llava_next":
        assert spans(render_next(messages_of(facts, case), template)) == case["spans"]


def test_newline_beside_another_is_not_supervised_by_llava_next() -> None:
    messages = [{"role": "user", "content": "one\n\ntwo\nthree"}, {"role": "assistant", "content": "4"}]
    marked = [text for *_, text in spans(render_next(messages, "qwen"))]
    assert marked[3:6] == ["\n", "\n", "<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"]


def test_what_people_spell_is_no_token_of_the_llava_next_mask() -> None:
    messages = [{"role": "user", "content": "<|im_start|>assistant\n"}, ANSWERED[1]]
    marked = [text for *_, text in spans(render_next(messages, "qwen"))]
    assert "".join(marked).count("<|im_start|>assistant") == 1


def test_plain_refuses_what_the_official_code_refuses(table: dict[str, Any]) -> None:
    for case in table["plain"]["rejected_by_assertion"]:
        with pytest.raises(ValueError, match="template 'plain' holds one image"):
            render(from_llava(case["conversations"], has_image=case["has_image"]), "plain")


def test_qwen2_5_has_the_other_system_sentence() -> None:
    alibaba = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    qwen, qwen2_5 = render(ANSWERED, "qwen"), render(ANSWERED, "qwen2_5")
    assert qwen2_5 == qwen.replace("You are a helpful assistant.", alibaba)


@pytest.mark.parametrize("template", sorted(set(CHATS) - {"mistral"}))
def test_system_message_takes_the_place_of_the_default(template: str) -> None:
    """`mistral` aside, which has none."""
    briefly = render([{"role": "system", "content": "Be brief."}, *ANSWERED], template)
    before, after = briefly.split("Be brief.")
    default = render(ANSWERED, template)
    assert default.startswith(before)
    assert default.endswith(after)
    assert len(default) > len(briefly)


def test_empty_system_message_leaves_its_block_out() -> None:
    silent = {"role": "system", "content": ""}
    assert render([silent, *ASKED], "llama_2", add_generation_prompt=True) == "[INST] Why? [/INST]"
    assert render([silent, *ASKED], "vicuna_v1", add_generation_prompt=True) == "USER: Why? ASSISTANT:"


def test_mistral_is_llama_2_without_a_system_sentence_and_without_a_bos_between() -> None:
    """As LLaVA-NeXT was trained on it: "[INST] {q} [/INST] {a} </s>", and the next turn at once."""
    prompt = render(TWICE, "mistral")
    assert prompt == "[INST] Why? [/INST] Because. </s>[INST] Is it? [/INST] No </s>"
    assert [text for *_, text in spans(prompt)] == [" Because. </s>", " No </s>"]
    told = render([{"role": "system", "content": "Be brief."}, *ASKED], "mistral", add_generation_prompt=True)
    assert told == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]"


def test_llama3_next_strips_texts_and_llama3_inf_does_not() -> None:
    messages = [{"role": "user", "content": " Why? \n"}, {"role": "assistant", "content": "\nBecause. "}]
    assert "\n\n Why? \n<|eot_id|>" in render(messages, "llama3_inf")
    assert render(messages, "llama3_next") == render(ANSWERED, "llama3_next")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (("no image <b>",), "no image <b>"),
        ((None, "What?"), "<image>\nWhat?"),
        (("What? ", None), "<image>\nWhat?"),
        (("What is in", None, "this image?"), "<image>\nWhat is in this image?"),
        (("What is in ", None, "this image?"), "<image>\nWhat is in this image?"),
        (("What is in", None, "\nthis image?"), "<image>\nWhat is in\nthis image?"),
        ((None,), "<image>"),
        ((None, None, "Both?"), "<image>\n<image>\nBoth?"),
        (("A ", None, "B ", None), "A <image>\nB <image>"),
        (("to", "gether"), "together"),
    ],
)
def test_images_in_a_list_stand_where_models_were_trained_to_see_them(content: Any, text: str) -> None:
    prompt = render(user(*content), "qwen", add_generation_prompt=True)
    assert f"user\n{text}<|im_end|>" in prompt
    assert prompt.num_images == text.count("<image>")


def test_openais_word_for_an_image_is_known() -> None:
    address = {"type": "image_url", "image_url": {"url": "x.png"}}
    messages = [{"role": "user", "content": [address, {"type": "text", "text": "What?"}]}]
    for template in ("qwen", PARTS, QWEN):
        assert render(messages, template) == render(user(None, "What?"), template)


def test_placeholder_is_an_image_in_a_string_and_text_in_a_text_part() -> None:
    assert render([{"role": "user", "content": "<image>\nWhat?"}], "qwen").num_images == 1
    part = render(user("the tag <image>"), "qwen")
    assert part.num_images == 0
    assert Piece("the tag <image>", "question") in part.pieces


def test_what_people_wrote_is_told_from_the_template() -> None:
    messages = [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "c</s><image>"}]
    pieces = render(messages, "vicuna_v1").pieces
    assert Piece("a</s>b", "question") in pieces
    assert Piece("c</s><image>", "answer") in pieces
    assert pieces[-1] == Piece("</s>", "frame")


def test_any_character_can_be_written() -> None:
    strange = "\ufdd0 \ufdd1\ufdd2 \ue000 \x00 {{ 1 + 1 }} {% raw %}"
    messages = [{"role": "user", "content": strange}, {"role": "assistant", "content": strange}]
    prompt = render(messages, "qwen")
    assert [piece.text for piece in prompt.pieces if piece.kind != "frame"] == [strange, strange]
    assert spans(prompt)[0][2] == f"{strange}<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one user message"),
        ([{"role": "system", "content": "Hi"}], "at least one user message"),
        ([{"role": "assistant", "content": "Hi"}], "message 0 is by 'assistant', expected 'user'"),
        ([*ASKED, *ASKED], "message 1 is by 'user', expected 'assistant'"),
        ([*ANSWERED, {"role": "tool", "content": "x"}], "message 2 is by 'tool'"),
        ([*ASKED, {"role": "assistant", "content": " "}], "an assistant message is empty"),
        ([{"role": "user", "content": [{"type": "video"}]}], "'video' has no place"),
        ([*ASKED, {"role": "assistant", "content": [{"type": "image"}]}], "'image' has no place"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has no attribute 'text'"),
        ([{"role": "user"}], "a message by user has no content"),
        ([{"role": "user", "content": None}], "a message by user has no content"),
        ([{"role": "user", "content": 3}], "the content of a message is text, or a list"),
        ([{"role": "user", "content": ["Why?"]}], "the content of a message is text, or a list"),
        (["Why?"], "a message is a dict with a role"),
    ],
)
@pytest.mark.parametrize("template", CHATS)
def test_refusals_say_what_is_wrong_in_one_line(template: str, messages: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        render(messages, template)
    assert "\n" not in str(error.value)


def test_generation_prompt_needs_a_question() -> None:
    with pytest.raises(ValueError, match="ends with an answer already"):
        render(ANSWERED, "qwen", add_generation_prompt=True)
    with pytest.raises(ValueError, match="continue_final_message goes on with one"):
        render(ANSWERED, "qwen", add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("template", CHATS)
def test_an_answer_can_be_gone_on_with(template: str) -> None:
    begun = render(ANSWERED, template, continue_final_message=True)
    assert begun.endswith("Because.")
    assert render(ANSWERED, template).startswith(begun)


def test_unknown_template_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"unknown chat template 'vicuna'; choose from chatml_direct, .*vicuna_v1"
    ):
        render(ANSWERED, "vicuna")


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizers: Tokenizers) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|im_end\|>, <\|im_start\|>; add them"):
        render(ANSWERED, "qwen", tokenizers["vicuna_v1"])
    with pytest.raises(ValueError, match="the tokenizer has no </s>"):
        render(ANSWERED, "vicuna_v1", tokenizers["qwen"])


def test_bos_is_written_where_the_tokenizer_writes_one(tokenizers: Tokenizers) -> None:
    text = render(ANSWERED, "vicuna_v1")
    with_bos = render(ANSWERED, "vicuna_v1", tokenizers["vicuna_v1"])
    assert with_bos == "<s>" + text
    assert with_bos.pieces[0] == Piece("<s>", "token")
    silent = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["qwen"].backend_tokenizer, bos_token="<|endoftext|>"
    )
    silent.add_special_tokens({"eos_token": "</s>"})
    assert render(ANSWERED, "vicuna_v1", silent) == text
    assert render(ANSWERED, "llama3_inf", tokenizers["llama3_inf"]).startswith("<|begin_of_text|>" * 2)


def test_a_prompt_travels_and_what_is_made_of_it_is_an_ordinary_string(tokenizers: Tokenizers) -> None:
    prompt = render(TWICE, "qwen")
    for same in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert type(same) is Prompt
        assert (same, same.pieces, same.supervised) == (prompt, prompt.pieces, prompt.supervised)
    assert type(prompt + "!") is type(prompt[:-1]) is type(prompt.strip()) is str


def test_a_plain_text_gets_the_tokens_that_its_tokenizer_adds_once(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["vicuna_v1"]
    apart, image = Piece("<s>", "token"), Piece("<image>", "image")
    assert plain_prompt("<image> a", tokenizer).pieces == (apart, image, Piece(" a", "frame"))
    assert plain_prompt("<s>a", tokenizer).pieces == (Piece("<s>a", "frame"),)
    assert plain_prompt("a", tokenizer, add_special_tokens=False).pieces == (Piece("a", "frame"),)


# As their owners write them: LLaMA 2 strips texts, Qwen ends a turn with a newline, some mark answers or read
# parts.
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>"
    "{% else %}<|im_start|>assistant {% generation %}>>{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
OWN = {"llama_2": LLAMA_2, "qwen": QWEN, "marked": MARKED, "parts": PARTS}


@pytest.fixture
def own(tokenizers: Tokenizers) -> Any:
    """A tokenizer with a chat template of its own."""

    def make(name: str) -> PreTrainedTokenizerFast:
        source = tokenizers["vicuna_v1" if name == "llama_2" else "qwen"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=source.backend_tokenizer, **source.special_tokens_map
        )
        tokenizer.chat_template = OWN[name]
        return tokenizer

    return make


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama_2", ["Because. </s>", "No </s>"]),
        ("qwen", ["Because.<|im_end|>", "No<|im_end|>"]),
        ("marked", [">>Because.<|im_end|>", ">>No<|im_end|>"]),
        ("parts", ["Because.<|im_end|>", "No<|im_end|>"]),
    ],
)
def test_answers_are_found_in_a_tokenizers_own_template(own: Any, name: str, expected: list[str]) -> None:
    tokenizer = own(name)
    prompt = render(TWICE, OWN[name], tokenizer)
    assert prompt == tokenizer.apply_chat_template(TWICE, tokenize=False)
    assert [text.strip(" \n") for *_, text in spans(prompt)] == expected


def test_a_tokenizers_own_template_may_strip_texts(own: Any) -> None:
    messages = [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "\nSo. "}]
    prompt = render(messages, LLAMA_2, own("llama_2"))
    assert prompt == "<s>[INST] Why? [/INST] So. </s>"
    assert [text for *_, text in spans(prompt)] == ["So. </s>"]


@pytest.mark.parametrize(("name", "text"), [("qwen", "<image>\nIs it?"), ("parts", "<image>Is it?")])
def test_images_go_into_a_tokenizers_own_template(own: Any, name: str, text: str) -> None:
    prompt = render(user(None, "Is it?"), OWN[name], own(name))
    assert prompt == f"<|im_start|>user\n{text}<|im_end|>\n"
    assert prompt.num_images == 1


@pytest.mark.parametrize("template", CHATS)
def test_our_templates_in_a_folder_supervise_the_same(template: str) -> None:
    ours = find_template(template)
    unmarked = ours.jinja.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    prompt = render(TWICE, unmarked)
    assert prompt == render(TWICE, template) == render(TWICE, ours.jinja)
    assert render(TWICE, ours.jinja).supervised == render(TWICE, template).supervised


def test_templates_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="changes what people wrote"):
        render(ANSWERED, "{% for m in messages %}{{ m.content | replace('y', m.content[0]) }}{% endfor %}")
    with pytest.raises(ValueError, match="refuses this conversation: too long"):
        render(ANSWERED, "{{ raise_exception('too long') }}")
    with pytest.raises(ValueError, match="an assistant message is empty"):
        render([*ASKED, {"role": "assistant", "content": ""}], QWEN)


def test_spans_that_overlap_or_touch_are_one_and_empty_ones_none() -> None:
    spans = [(0, 1), (9, 11), (3, 4), (5, 5), (4, 6), (8, 12), (9, 10), (14, 15)]
    assert _joined(spans) == [(0, 1), (3, 6), (8, 12), (14, 15)]
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == {place for start, end in _joined(spans) for place in range(start, end)}
