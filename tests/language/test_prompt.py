"""Prompts against those recorded from the official code, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell.language.conversation import from_llava
from stepwell.language.prompt import TEMPLATES, Piece, Rendered, content_pieces, render

ASKED = [{"role": "user", "content": "Why?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Because."}]
CHATS = sorted(set(TEMPLATES) - {"plain"})


def messages_of(facts: dict[str, Any], case: dict[str, Any]) -> list[Any]:
    rule = "llava_next" if facts["family"] == "llava_next" else "llava"
    return from_llava(case["conversations"], has_image=case["has_image"], rule=rule)


def spans(rendered: Rendered) -> list[list[Any]]:
    return [[start, end, rendered.text[start:end]] for start, end in rendered.spans]


def test_text_is_that_of_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    assert render(template, messages_of(facts, case)).text == case["prompt"]


def test_generation_prompt_is_that_of_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    asked = messages_of(facts, case)[:-1]
    if case["generation_prompt"] is None:
        with pytest.raises(ValueError, match="nothing else; got a generation prompt"):
            render(template, asked, add_generation_prompt=True)
    else:
        rendered = render(template, asked, add_generation_prompt=True)
        assert rendered.text == case["generation_prompt"]
        assert rendered.is_open


def test_answers_and_their_end_are_supervised(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    expected = case["content_only_spans"] if facts["content_only_spans"] else case["spans"]
    assert spans(render(template, messages_of(facts, case))) == expected


def test_llava_next_mask_is_that_of_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    messages = messages_of(facts, case)
    if facts["family"] == "llava_next":
        assert spans(render(template, messages, mask_style="llava_next")) == case["spans"]
    else:
        with pytest.raises(ValueError, match="no llava_next mask; only llama3_next, qwen, qwen2_5 do"):
            render(template, messages, mask_style="llava_next")


def test_plain_refuses_what_the_official_code_refuses(table: dict[str, Any]) -> None:
    for case in table["plain"]["rejected_by_assertion"]:
        with pytest.raises(ValueError, match="template 'plain'"):
            render("plain", from_llava(case["conversations"], has_image=case["has_image"]))


def test_qwen2_5_has_the_other_system_sentence() -> None:
    qwen, qwen2_5 = render("qwen", ANSWERED).text, render("qwen2_5", ANSWERED).text
    alibaba = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert qwen2_5 == qwen.replace("You are a helpful assistant.", alibaba)


@pytest.mark.parametrize("template", CHATS)
def test_system_message_takes_the_place_of_the_default(template: str) -> None:
    default = TEMPLATES[template].system
    rendered = render(template, [{"role": "system", "content": "Be brief."}, *ANSWERED])
    assert rendered.text == render(template, ANSWERED).text.replace(default, "Be brief.")


def test_empty_system_message_leaves_its_block_out() -> None:
    silent = {"role": "system", "content": ""}
    assert render("llama_2", [silent, *ASKED], add_generation_prompt=True).text == "[INST] Why? [/INST]"
    assert render("vicuna_v1", [silent, *ASKED], add_generation_prompt=True).text == "USER: Why? ASSISTANT:"


def test_llama3_next_strips_texts_and_llama3_inf_does_not() -> None:
    messages = [{"role": "user", "content": " Why? \n"}, {"role": "assistant", "content": "\nBecause. "}]
    assert "\n\n Why? \n<|eot_id|>" in render("llama3_inf", messages).text
    assert render("llama3_next", messages).text == render("llama3_next", ANSWERED).text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("no picture <b>", "no picture <b>"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<image>\nWhat?"),
        ([{"type": "text", "text": "What? "}, {"type": "image_url"}], "<image>\nWhat?"),
        ([{"type": "image"}], "<image>"),
        (
            [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Both?"}],
            "<image>\n<image>\nBoth?",
        ),
        (
            [
                {"type": "text", "text": "A "},
                {"type": "image"},
                {"type": "text", "text": "B "},
                {"type": "image"},
            ],
            "A <image>\nB <image>",
        ),
    ],
)
def test_pictures_in_a_list_stand_where_models_were_trained_to_see_them(content: Any, text: str) -> None:
    pieces = content_pieces(content)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.kind == "image" for piece in pieces) == text.count("<image>")


def test_placeholder_is_a_picture_in_a_string_and_text_in_a_text_part() -> None:
    assert content_pieces("<image>\nWhat?")[0] == Piece("<image>", "image")
    assert content_pieces([{"type": "text", "text": "the tag <image>"}]) == [Piece("the tag <image>", "text")]


def test_special_tokens_in_messages_are_text() -> None:
    messages = [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "c</s><image>"}]
    kinds = [(piece.text, piece.kind) for piece in render("vicuna_v1", messages).pieces]
    assert ("a</s>b", "text") in kinds
    assert ("c</s><image>", "text") in kinds
    assert kinds[-1] == ("</s>", "special")
    assert render("vicuna_v1", messages).num_images == 0


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
    ],
)
@pytest.mark.parametrize("template", CHATS)
def test_refusals_say_what_is_wrong(template: str, messages: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        render(template, messages)


def test_generation_prompt_needs_a_question() -> None:
    with pytest.raises(ValueError, match="ends with an answer already"):
        render("qwen", ANSWERED, add_generation_prompt=True)


def test_unknown_template_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"unknown chat template 'vicuna'; choose from chatml_direct, .*vicuna_v1"
    ):
        render("vicuna", ANSWERED)
