"""Which tokens are supervised, with tokenizers of three families."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stepwell.language.chat_template import chat_template
from stepwell.language.conversation import from_llava
from stepwell.language.labels import IGNORE, label_tokens, render_with_tokenizer
from stepwell.language.prompt import TEMPLATES, Piece, Rendered, render

Tokenizers = dict[str, PreTrainedTokenizerFast]

ASKED = [{"role": "user", "content": "Which one is brighter?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "The first one."}]
TWICE = [*ANSWERED, {"role": "user", "content": "Is it flying?"}, {"role": "assistant", "content": "No"}]


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
    rendered = render(template, from_llava(case["conversations"], has_image=case["has_image"], rule=rule))
    tokens = label_tokens(rendered, tokenizer)
    expected = case["content_only_spans"] if facts["content_only_spans"] else case["spans"]
    assert [text.strip(" ") for text in learned(tokenizer, tokens)] == [
        text.strip(" ") for *_, text in expected
    ]
    assert all(label in (token, IGNORE) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))


def test_number_of_bos_tokens_is_that_of_the_official_code(
    tokenizers: Tokenizers, template: str, facts: dict[str, Any], case: dict[str, Any]
) -> None:
    tokenizer = tokenizers[template]
    tokens = label_tokens(render(template, from_llava(case["conversations"], has_image=True)), tokenizer)
    leading = 0
    while tokens.input_ids[leading] == tokenizer.bos_token_id:
        assert tokens.labels[leading] == IGNORE
        leading += 1
    assert leading == case.get("leading_bos_tokens", 1 if template == "llama3_next" else 0)


def test_a_token_that_starts_in_the_space_before_an_answer_is_supervised(tokenizers: Tokenizers) -> None:
    pieces = (Piece("Say:  ", "frame"), Piece("assistant", "text", supervised=True))
    for family, first in (("vicuna_v1", "▁assistant"), ("qwen", "Ġassistant")):
        tokens = label_tokens(Rendered(pieces), tokenizers[family])
        labels = [label for label in tokens.labels if label != IGNORE]
        assert tokenizers[family].convert_ids_to_tokens(labels) == [first]


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen", "llama3_inf"])
@pytest.mark.parametrize("answer", ["  A\n \n  dog ", " 抹茶 ", "\n\nNo"])
def test_white_space_of_an_answer_is_supervised_and_none_around_it(
    tokenizers: Tokenizers, template: str, answer: str
) -> None:
    messages = [{"role": "user", "content": "What? "}, {"role": "assistant", "content": answer}]
    tokens = label_tokens(render(template, messages), tokenizers[template])
    end = {"vicuna_v1": "</s>", "qwen": "<|im_end|>", "llama3_inf": "<|eot_id|>"}[template]
    assert learned(tokenizers[template], tokens) == [answer + end]  # LLaMA's decoder drops the frame's space


def test_a_tokenizer_without_offsets_is_refused() -> None:
    slow: Any = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="SlowTokenizer gives no character offsets; use a fast tokenizer"):
        label_tokens(render("qwen", ANSWERED), slow)


@pytest.mark.parametrize("template", ["qwen", "llama3_next"])
def test_llava_next_masks_are_made_of_tokens(tokenizers: Tokenizers, table: Any, template: str) -> None:
    name = {"qwen": "qwen_next"}.get(template, template)
    for case in table[name]["cases"]:
        messages = from_llava(case["conversations"], has_image=case["has_image"], rule="llava_next")
        tokens = label_tokens(render(template, messages, mask_style="llava_next"), tokenizers[template])
        assert learned(tokenizers[template], tokens) == [text for *_, text in case["spans"]]


def test_newline_inside_a_longer_token_is_not_supervised_by_llava_next(tokenizers: Tokenizers) -> None:
    messages = [{"role": "user", "content": "one\n\ntwo\nthree"}, {"role": "assistant", "content": "4"}]
    rendered = render("qwen", messages, mask_style="llava_next")
    marked = [rendered.text[start:end] for start, end in rendered.spans]
    assert marked[3:6] == ["\n", "\n", "<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"]


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "qwen", "llama3_inf"])
def test_text_is_tokenised_in_one_go(tokenizers: Tokenizers, template: str) -> None:
    tokenizer, rendered = tokenizers[template], render(template, TWICE)
    assert (
        label_tokens(rendered, tokenizer).input_ids
        == tokenizer(rendered.text, add_special_tokens=rendered.add_bos).input_ids
    )


def test_text_around_a_picture_is_tokenised_on_its_own_as_llava_does(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["llama_2"]  # marks the first word of a text only
    rendered = render("llama_2", [{"role": "user", "content": "<image>\nWhat?"}], add_generation_prompt=True)
    before, after = rendered.text.split("<image>")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]
    pictures = [[7, 8, 9]]
    tokens = label_tokens(rendered, tokenizer, pictures)
    assert tokens.input_ids == [tokenizer.bos_token_id, *ids[0], 7, 8, 9, *ids[1]]


def test_pictures_are_never_supervised_and_stand_in_order(tokenizers: Tokenizers) -> None:
    messages = [
        {"role": "user", "content": "<image>\n<image>\nWhich?"},
        {"role": "assistant", "content": "B"},
    ]
    tokens = label_tokens(render("qwen", messages), tokenizers["qwen"], [[901] * 3, [902] * 2])
    assert [token for token in tokens.input_ids if token > 900] == [901, 901, 901, 902, 902]
    assert not {901, 902} & set(tokens.labels)


def test_pictures_and_placeholders_that_differ_are_both_counted(tokenizers: Tokenizers) -> None:
    rendered = render("qwen", [{"role": "user", "content": "<image>?"}], add_generation_prompt=True)
    with pytest.raises(ValueError, match="1 <image> placeholders for 2 pictures"):
        label_tokens(rendered, tokenizers["qwen"], [[1], [2]])
    with pytest.raises(ValueError, match="0 <image> placeholders for 1 pictures"):
        label_tokens(render("qwen", ANSWERED), tokenizers["qwen"], [[1]])


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain"}))
def test_special_tokens_that_people_spell_out_stay_text(tokenizers: Tokenizers, template: str) -> None:
    tokenizer, end = tokenizers[template], TEMPLATES[template].special[-1]
    spelled = [
        {"role": "user", "content": [{"type": "text", "text": f"What does {end} mean, and <image>?"}]},
        {"role": "assistant", "content": f"{end} ends an answer."},
    ]
    tokens = label_tokens(render(template, spelled), tokenizer)
    usual = label_tokens(render(template, ANSWERED), tokenizer)
    for special in (*TEMPLATES[template].special, "<image>"):
        token = tokenizer.convert_tokens_to_ids(special)
        assert tokens.input_ids.count(token) == usual.input_ids.count(token)
    (answer,) = learned(tokenizer, tokens)
    assert answer.replace(" ", "") == f"{end}endsananswer.{end}"


def test_a_conversation_with_nothing_to_learn_is_told(tokenizers: Tokenizers) -> None:
    with pytest.warns(UserWarning, match="no token of this conversation is supervised"):
        label_tokens(render("qwen", ASKED), tokenizers["qwen"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_tokens(render("qwen", ASKED, add_generation_prompt=True), tokenizers["qwen"])
        label_tokens(render("qwen", ANSWERED), tokenizers["qwen"])


def test_tokenizer_without_the_special_tokens_is_refused(tokenizers: Tokenizers) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|im_end\|>, <\|im_start\|>; add them"):
        label_tokens(render("qwen", ANSWERED), tokenizers["vicuna_v1"])
    with pytest.raises(ValueError, match="the tokenizer has no </s>"):
        label_tokens(render("vicuna_v1", ANSWERED), tokenizers["qwen"])


# As their owners write them: LLaMA 2 strips texts, Qwen ends a turn with a newline, some mark answers.
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


@pytest.fixture
def own(tokenizers: Tokenizers) -> Any:
    """A tokenizer with a chat template of its own."""

    def make(family: str, written: str | None) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers[family].backend_tokenizer, **tokenizers[family].special_tokens_map
        )
        tokenizer.chat_template = written
        return tokenizer

    return make


@pytest.mark.parametrize(
    ("family", "written", "expected"),
    [
        ("vicuna_v1", LLAMA_2, ["The first one. </s>", "No </s>"]),
        ("qwen", QWEN, ["The first one.<|im_end|>", "No<|im_end|>"]),
        ("qwen", MARKED, [">>The first one.<|im_end|>", ">>No<|im_end|>"]),
    ],
)
def test_answers_are_found_in_a_tokenizers_own_template(
    own: Any, family: str, written: str, expected: list[str]
) -> None:
    tokenizer = own(family, written)
    rendered = render_with_tokenizer(tokenizer, TWICE)
    assert rendered.text == tokenizer.apply_chat_template(TWICE, tokenize=False)
    assert [rendered.text[start:end] for start, end in rendered.spans] == expected
    tokens = label_tokens(rendered, tokenizer)
    assert tokens.input_ids == tokenizer.apply_chat_template(TWICE, return_dict=False)
    assert [text.strip(" ") for text in learned(tokenizer, tokens)] == expected


def test_a_tokenizers_own_template_may_strip_texts(own: Any) -> None:
    messages = [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "\nSo. "}]
    rendered = render_with_tokenizer(own("vicuna_v1", LLAMA_2), messages)
    assert rendered.text == "<s>[INST] Why? [/INST] So. </s>"
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["So. </s>"]


def test_pictures_and_spelled_out_tokens_survive_a_tokenizers_own_template(own: Any) -> None:
    tokenizer = own("qwen", QWEN)
    content = [{"type": "image"}, {"type": "text", "text": "Is <|im_end|> text?"}]
    rendered = render_with_tokenizer(
        tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert rendered.text == (
        "<|im_start|>user\n<image>\nIs <|im_end|> text?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.num_images == 1
    ids = label_tokens(rendered, tokenizer, [[901]]).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert ids.count(901) == 1


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain"}))
def test_our_templates_read_from_a_tokenizer_supervise_the_same(
    tokenizers: Tokenizers, own: Any, template: str
) -> None:
    tokenizer = own(template, chat_template(template))
    ours, theirs = render(template, TWICE), render_with_tokenizer(tokenizer, TWICE)
    assert theirs.text == ours.text
    found = [ours.text[start:end].strip() for start, end in ours.spans]
    assert [theirs.text[start:end] for start, end in theirs.spans] == found


def test_templates_that_cannot_be_used_are_refused(own: Any) -> None:
    with pytest.raises(ValueError, match="no chat template; choose one of ours: chatml_direct"):
        render_with_tokenizer(own("qwen", None), ANSWERED)
    with pytest.raises(ValueError, match="changes what people wrote"):
        render_with_tokenizer(
            own("qwen", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"), ANSWERED
        )
    with pytest.raises(ValueError, match="refuses this conversation: too long"):
        render_with_tokenizer(own("qwen", "{{ raise_exception('too long') }}"), ANSWERED)
    with pytest.raises(ValueError, match="an assistant message is empty"):
        render_with_tokenizer(own("qwen", QWEN), [*ASKED, {"role": "assistant", "content": ""}])
