"""One tokenisation: training, apply_chat_template, and its text handed to the processor give the same tokens.

Seven tokenizers, all templates, conversations with images and special tokens where people put them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from stepwell.images.limits import DEFAULT_LIMITS
from stepwell.language.labels import IGNORE, separator_tokens
from stepwell.language.template import TEMPLATES
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import TokenLayout, TokenRun

IMAGE = Image.new("RGB", (4, 3))
FAMILIES = [
    "sentencepiece, old files",
    "sentencepiece, old",
    "sentencepiece, new",
    "byte-level",
    "byte-level with BOS",
    "tiktoken",
    "reader",
]
CHATS = sorted(set(TEMPLATES) - {"plain"})


class Images(BaseImageProcessor):
    """Two stretches of visual tokens an image, separators of every kind; counts its calls."""

    model_input_names = ["image_sizes"]
    layouts, fetch_images = StepwellImageProcessor.layouts, StepwellImageProcessor.fetch_images
    limits = DEFAULT_LIMITS
    runs = (
        TokenRun(count=3),
        TokenRun(text=","),
        TokenRun(count=2),
        TokenRun(text="\n"),
        TokenRun(ids=(9, 8)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.geometry, self.calls = self, 0

    def layout(self, size: Any) -> TokenLayout:
        return TokenLayout(image_size=size, inputs=(size,), views=(), runs=self.runs)

    def layout_of(self, size: Any, region: Any) -> TokenLayout:
        return self.layout(size)

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        self.calls += 1
        return BatchFeature({"image_sizes": torch.tensor([(image.height, image.width) for image in images])})


def user(*content: Any) -> dict[str, Any]:
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SHOWN = {"type": "image", "image": IMAGE}
SPELLED = "</s>x<|im_end|><image><|eot_id|>\n<s> <|im_start|>"
CONVERSATIONS = {
    "text": [user("What is two and two?"), says("Four")],
    "image before": [user(SHOWN, "What is it?"), says("A cat.")],
    "image after": [user("What is it? ", SHOWN), says("A cat.")],
    "image between": [user("What is in", SHOWN, "this image?"), says("\n 抹茶 ")],
    "two images": [user("First ", SHOWN, "\nthen", SHOWN, "?"), says("Both")],
    "placeholder in a string": [{"role": "user", "content": "<image>\n\nWhat?"}, says("A cat.")],
    "system": [{"role": "system", "content": "Be brief."}, user(SHOWN, "What?"), says("No")],
    "turns": [
        user(SHOWN, "What?"),
        says("A cat."),
        user(" And? "),
        says(" 1.50\n\n"),
        user(SHOWN),
        says("No"),
    ],
    "spelled": [user(SHOWN, SPELLED), says(SPELLED), user(SPELLED, SHOWN, SPELLED), says(f"a{SPELLED} b")],
    "spelled system": [{"role": "system", "content": SPELLED}, user(f"{SPELLED} "), says("No")],
}
CAPTION = [user(SHOWN, f"Describe {SPELLED}"), says(f"A {SPELLED}")]


def num_images(messages: list[Any]) -> int:
    contents = [m["content"] for m in messages]
    return sum(c.count(SHOWN) if isinstance(c, list) else c.count("<image>\n") for c in contents)


@pytest.fixture(scope="module")
def build(families: dict[str, PreTrainedTokenizerFast]) -> Any:
    def made(family: str, template: str | None, **options: Any) -> StepwellProcessor:
        return StepwellProcessor(Images(), families[family], template=template, **options)

    return made


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("family", FAMILIES)
def test_all_roads_give_the_same_tokens(build: Any, family: str, template: str) -> None:
    processor = build(family, template)
    for name, messages in CONVERSATIONS.items() if template != "plain" else [("caption", CAPTION)]:
        images = [IMAGE] * num_images(messages)
        tokens = processor.label(messages, images)
        beside = {"images": images} if name == "placeholder in a string" else {}
        road = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **beside
        )
        assert road["input_ids"] == [tokens.input_ids], name
        assert road["assistant_masks"] == [[int(label != IGNORE) for label in tokens.labels]], name
        text = processor.apply_chat_template(messages)
        assert processor(text=text, images=images or None)["input_ids"] == [tokens.input_ids], name
        if template != "plain":
            asked = processor.label(
                messages[:-1], images[: num_images(messages[:-1])], add_generation_prompt=True
            )
            opened = processor.apply_chat_template(
                messages[:-1],
                add_generation_prompt=True,
                tokenize=True,
                processor_kwargs=beside,
            )
            assert opened == [asked.input_ids], name


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_cut_at_images_and_nowhere_else(build: Any, family: str, template: str) -> None:
    """As in LLaVA: what the tokenizer makes of each stretch on its own, images between, BOS in front."""
    processor = build(family, template)
    tokenizer, layout = processor.tokenizer, processor.geometry.layout((3, 4))
    image = [processor.image_token_id] * 3 + separator_tokens(",", tokenizer) + [processor.image_token_id] * 2
    image += [*separator_tokens("\n", tokenizer), 9, 8]
    assert processor.image_tokens(layout) == image
    for name in ("text", "image before", "image between", "two images", "turns"):
        text = processor.apply_chat_template(CONVERSATIONS[name])
        has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        expected = []
        if has_bos and template in ("vicuna_v1", "llama_2", "mistral", "llama3_inf"):
            expected, text = [tokenizer.bos_token_id], text.removeprefix(tokenizer.bos_token)
        first, *others = text.split("<image>")
        expected += tokenizer(first, add_special_tokens=False).input_ids
        for stretch in others:
            expected += image + tokenizer(stretch, add_special_tokens=False).input_ids
        images = [IMAGE] * len(others) or None
        prompt = processor.apply_chat_template(CONVERSATIONS[name])
        assert processor(text=prompt, images=images)["input_ids"] == [expected], name


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_people_spell_stay_text(build: Any, family: str, template: str) -> None:
    processor = build(family, template)
    special = {t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
    ids = set(processor.tokenizer.convert_tokens_to_ids(sorted(special))) - {processor.image_token_id, 0}
    spelled = [user(SPELLED), says(SPELLED), user(f"a{SPELLED}"), says(f"{SPELLED}b")]
    plain = [user("x"), says("x"), user("x"), says("x")]
    counts = [
        Counter(token for token in processor.label(messages, []).input_ids if token in ids)
        for messages in (spelled, plain)
    ]
    assert counts[0] == counts[1]
    assert processor.image_token_id not in processor.label(spelled, []).input_ids
    assert f"a{SPELLED}" in processor.tokenizer.decode(processor.label(spelled, []).input_ids)


def test_llama3_inf_has_the_two_bos_it_was_trained_with_and_others_one(build: Any) -> None:
    for template, count in {
        "llama3": 1,
        "llama3_inf": 2,
        "llama3_next": 1,
        "vicuna_v1": 1,
        "plain": 1,
        "qwen": 0,
    }.items():
        processor = build("byte-level with BOS", template)
        ids = processor.label(CAPTION, [IMAGE]).input_ids
        assert ids.count(processor.tokenizer.bos_token_id) == count


def test_images_of_a_batch_are_processed_in_one_call(build: Any) -> None:
    processor = build("reader", "qwen")
    chats = [CONVERSATIONS[name] for name in ("image before", "text", "two images")]
    batch = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert processor.image_processor.calls == 1
    assert len(batch["image_sizes"]) == 3
    assert batch["input_ids"].shape[0] == 3
