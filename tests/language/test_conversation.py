"""LLaVA's conversations against what the official code makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell.language.conversation import from_llava, move_placeholder


def test_placeholders_move_as_in_the_official_code(
    template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    rule = "llava_next" if facts["family"] == "llava_next" else "llava"
    for before, after in zip(case["conversations"], case["after_multimodal"], strict=True):
        moved = move_placeholder(before["value"], rule) if case["has_image"] else before["value"]
        assert moved == after["value"]


def test_llava_makes_one_placeholder_of_several_and_llava_next_keeps_them() -> None:
    text = "First <image> then <image>."
    assert move_placeholder(text, "llava") == "<image>\nFirst  then ."
    assert move_placeholder(text, "llava_next") == text


@pytest.mark.parametrize("rule", ["llava", "llava_next"])
def test_one_placeholder_goes_to_the_front(rule: Any) -> None:
    assert move_placeholder(" Look: <image> nice? ", rule) == "<image>\nLook:  nice?"
    assert move_placeholder("<image>", rule) == "<image>"
    assert move_placeholder("  as it is \n", rule) == "  as it is \n"


def test_llava_next_leaves_a_placeholder_at_the_front_untouched() -> None:
    assert move_placeholder("<image> What? ", "llava_next") == "<image> What? "


def test_one_leading_answer_is_dropped() -> None:
    turns = [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert [message["role"] for message in from_llava(turns, has_image=False)] == ["user", "assistant"]
    assert from_llava(turns[1:], has_image=False) == from_llava(turns, has_image=False)
    assert from_llava([], has_image=False) == []


def test_without_an_image_a_placeholder_is_text() -> None:
    (message,) = from_llava([{"from": "human", "value": "the <image> tag"}], has_image=False)
    assert message["content"] == [{"type": "text", "text": "the <image> tag"}]


def test_unknown_speaker_is_refused() -> None:
    with pytest.raises(ValueError, match="turn 0 is from 'bing'; expected one of human, gpt"):
        from_llava([{"from": "bing", "value": "x"}], has_image=False)
