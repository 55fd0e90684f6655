"""Every template in Jinja, rendered by transformers, gives the text of the official code and of render."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from stepwell.language.chat_template import chat_template
from stepwell.language.conversation import from_llava
from stepwell.language.prompt import TEMPLATES, render

WORDS = st.text(alphabet="ab <>/\n'\"{}%é抹", max_size=8)
PART = st.one_of(
    WORDS.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from([{"type": "image"}, {"type": "image_url"}]),
)
QUESTION = st.one_of(WORDS, st.lists(PART, max_size=4))
ANSWER = WORDS.filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(QUESTION)})
        messages.append({"role": "assistant", "content": draw(ANSWER)})
    return messages[: len(messages) - draw(st.integers(0, 1))]


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["qwen"]


def apply(tokenizer: Any, template: str, messages: list[Any], **options: Any) -> str:
    written = chat_template(template)
    return tokenizer.apply_chat_template(messages, chat_template=written, tokenize=False, **options)


def test_jinja_gives_the_text_of_the_official_code(
    tokenizer: Any, template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    rule = "llava_next" if facts["family"] == "llava_next" else "llava"
    messages = from_llava(case["conversations"], has_image=case["has_image"], rule=rule)
    assert apply(tokenizer, template, messages) == case["prompt"]
    if case["generation_prompt"] is not None:
        opened = apply(tokenizer, template, messages[:-1], add_generation_prompt=True)
        assert opened == case["generation_prompt"]


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain"}))
def test_jinja_and_render_agree_on_any_conversation(tokenizer: Any, template: str) -> None:
    @given(conversations())
    def agree(messages: list[Any]) -> None:
        is_open = messages[-1]["role"] == "user"
        expected = render(template, messages, add_generation_prompt=is_open).text
        assert apply(tokenizer, template, messages, add_generation_prompt=is_open) == expected

    agree()


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Hi"}],
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
        [{"role": "user", "content": [{"type": "video"}]}],
    ],
)
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_jinja_refuses_what_render_refuses(tokenizer: Any, template: str, messages: list[Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (test_prompt.py knows the words)
        render(template, messages)
    with pytest.raises(TemplateError):
        apply(tokenizer, template, messages)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([{"role": "user", "content": "no picture"}, {"role": "assistant", "content": "a"}], {}),
        ([{"role": "user", "content": "<image>"}], {"add_generation_prompt": True}),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "<image>"}], {}),
    ],
)
def test_plain_in_jinja_holds_a_picture_and_its_caption(
    tokenizer: Any, messages: list[Any], options: dict[str, bool]
) -> None:
    with pytest.raises(TemplateError, match="one picture and its caption"):
        apply(tokenizer, "plain", messages, **options)
