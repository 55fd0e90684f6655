"""Our templates as anybody renders them: a tokenizer gives the text, and the mask, of render."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _get_template_variables

from stepwell.language.conversation import from_llava
from stepwell.language.labels import IGNORE, label_tokens
from stepwell.language.prompt import render
from stepwell.language.template import TEMPLATES, find_template, template_of

Tokenizers = dict[str, PreTrainedTokenizerFast]

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


def apply(tokenizer: Any, template: str, messages: list[Any], **options: Any) -> Any:
    written = find_template(template).jinja
    return tokenizer.apply_chat_template(messages, chat_template=written, **{"tokenize": False, **options})


def test_text_is_that_of_the_official_code(
    tokenizers: Tokenizers, template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    rule = "llava_next" if facts["family"] == "llava_next" else "llava"
    messages = from_llava(case["conversations"], has_image=case["has_image"], rule=rule)
    assert apply(tokenizers["qwen"], template, messages) == case["prompt"]
    if case["generation_prompt"] is not None:
        opened = apply(tokenizers["qwen"], template, messages[:-1], add_generation_prompt=True)
        assert opened == case["generation_prompt"]


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain"}))
def test_render_agrees_on_any_conversation(tokenizers: Tokenizers, template: str) -> None:
    @given(conversations())
    def agree(messages: list[Any]) -> None:
        is_open = messages[-1]["role"] == "user"
        prompt = render(messages, template, tokenizers[template], add_generation_prompt=is_open)
        assert apply(tokenizers[template], template, messages, add_generation_prompt=is_open) == prompt
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        supervised = [prompt[start:end] for start, end in prompt.supervised]
        assert all(answer in text for answer, text in zip(answers, supervised, strict=True))

    agree()


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain", "llama_2", "mistral"}))
def test_the_assistant_mask_of_transformers_is_ours(tokenizers: Tokenizers, template: str) -> None:
    """`llama_2` and `mistral` aside: their answers begin in a space that transformers counts to a word, and
    we do not.
    """
    tokenizer = tokenizers[template]
    messages = [
        {"role": "user", "content": "Which one is it?"},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    theirs = apply(
        tokenizer, template, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = label_tokens(render(messages, template, tokenizer), tokenizer, [])
    assert ours.input_ids == theirs["input_ids"]
    assert [label != IGNORE for label in ours.labels] == [bool(mask) for mask in theirs["assistant_masks"]]


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
def test_refusals_are_the_templates_own(tokenizers: Tokenizers, template: str, messages: list[Any]) -> None:
    with pytest.raises(TemplateError):
        apply(tokenizers["qwen"], template, messages)


@pytest.mark.parametrize(
    ("messages", "got"),
    [
        ([{"role": "user", "content": "-"}, {"role": "assistant", "content": "a"}], "no image"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "<image>"}], "a system message"),
        ([{"role": "user", "content": "<image>"}], "1 messages"),
    ],
)
def test_plain_holds_an_image_and_its_caption(messages: list[Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"one image .* and its caption, and nothing else; got {got}"):
        render(messages, "plain")


def test_plain_leaves_out_what_stands_beside_the_image() -> None:
    messages = [{"role": "user", "content": "<image>\nDescribe."}, {"role": "assistant", "content": "A cat"}]
    prompt = render(messages, "plain")
    assert prompt == "<image>A cat\n"
    assert [prompt[start:end] for start, end in prompt.supervised] == ["A cat\n"]


def test_a_template_is_known_by_its_text() -> None:
    assert {template_of(template.jinja) for template in TEMPLATES.values()} == set(TEMPLATES.values())
    assert template_of("{{ messages }}") is template_of(None) is None


def test_a_template_reads_the_conversation_and_nothing_else() -> None:
    """What transformers takes for a variable of the template never reaches the processor."""
    variables = {"messages", "add_generation_prompt", "bos_token"}
    for template in TEMPLATES.values():
        assert _get_template_variables(template.jinja) <= variables, template.name
