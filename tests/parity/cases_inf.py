"""Golden files of INF-LLaVA and of what the LLaVA family shares: how each kind is built and run.

Letters: B batch, L text length, N visual tokens of an image, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_next import render_next
from record import Case, Record, TableCheck
from stepwell.keys.engine import Rename
from stepwell.language.conversation import PlaceholderRule, from_llava, move_placeholder
from stepwell.language.messages import Message
from stepwell.language.projector import build_projector
from stepwell.language.prompt import render
from stepwell.language.splice import place_visual_tokens
from stepwell.language.template import find_template

__all__ = ["CASES", "spliced"]

# Numbered as a Sequential, entries 0, 2, 4..., or one linear layer; ours has the same modules.
PROJECTOR = [Rename(r"(?:\d+\.)?(?:weight|bias)", r"\g<0>")]


def _projector(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = build_projector(s["projector_type"], s["mm_hidden_size"], s["hidden_size"])
    return {"y": record.load_into(module, PROJECTOR)(record.inputs["x"])}


def _splice(record: Record) -> dict[str, Tensor]:
    s = record.settings
    batch = [record.inputs[name] for name in ("input_ids", "labels", "attention_mask")]
    images = [([s["image_token_index"]] * len(image), image) for image in record.inputs["image_features"]]

    def embed(ids: Tensor) -> Tensor:
        return F.embedding(ids.clamp(min=0), record.params["embed_tokens.weight"])

    return spliced(
        batch,
        images,
        embed,
        s,
        padding_side=s["padding_side"],
        max_length=s["model_max_length"],
        pad=s["pad_id"],
    )


def spliced(
    batch: Sequence[Tensor],
    images: Sequence[tuple[list[int], Tensor]],
    embed: Callable[[Tensor], Tensor],
    settings: Mapping[str, Any],
    *,
    padding_side: str,
    max_length: int,
    pad: int = 0,
) -> dict[str, Tensor]:
    """Official code marks an image with one sentinel id; we mark each visual token, here with that id.

    batch: input_ids, labels and attention_mask (B, L). images: the ids that stand for each, separators among
    them, and its visual tokens (N, D), in reading order. embed: (B, L) -> (B, L, D), also of sentinels.
    """
    sentinel, ignore = settings["image_token_index"], settings["ignore_index"]
    unread = iter(images)
    rows: list[tuple[Tensor, Tensor]] = []
    visual: list[Tensor] = []
    for row, labels, mask in zip(*batch, strict=True):
        row, labels = row[mask.bool()].tolist(), labels[mask.bool()].tolist()
        ids: list[int] = []
        targets: list[int] = []
        shown = [images[0][1][:0]]
        for i, label in zip(row, labels, strict=True):
            stretch, tokens = next(unread) if i == sentinel else ([i], shown[0])
            ids += stretch
            targets += [ignore if i == sentinel else label] * len(stretch)
            shown.append(tokens)
        if sentinel not in row and settings["text_only_row_owns_dummy_image"]:
            next(unread)
        rows.append((torch.tensor(ids[:max_length]), torch.tensor(targets[:max_length])))
        visual.append(torch.cat(shown)[: ids[:max_length].count(sentinel)])
    length = max(len(ids) for ids, _ in rows)

    def stack(values: list[Tensor], filler: int) -> Tensor:
        left = padding_side == "left"
        sides = [(length - len(v), 0) if left else (0, length - len(v)) for v in values]
        return torch.stack([F.pad(v, side, value=filler) for v, side in zip(values, sides, strict=True)])

    input_ids = stack([ids for ids, _ in rows], pad)
    attention_mask = stack([torch.ones_like(ids) for ids, _ in rows], 0)
    embedded = place_visual_tokens(input_ids, embed(input_ids), torch.cat(visual), sentinel)
    return {
        "inputs_embeds": embedded * attention_mask[..., None],
        "labels": stack([labels for _, labels in rows], ignore),
        "attention_mask": attention_mask,
    }


def _conversations(record: Record) -> TableCheck:
    """Every template of the table: text, generation prompt and supervised characters, from `render` and from
    transformers."""
    renamed = {"chatml_direct_official_mpt": "chatml_direct", "qwen_next": "qwen"}
    differences: list[str] = []
    for name, facts in record.settings["templates"].items():
        part = record.table[name]
        ours = renamed.get(name, name)
        for case in part["cases"]:
            differences += [f"{name}/{case['id']}: {what}" for what in _conversation(ours, facts, case)]
        for case in part.get("rejected_by_assertion", []):
            messages = from_llava(case["conversations"], has_image=case["has_image"])
            if not _refuses(ours, messages):
                differences.append(f"{name}/{case['id']}: accepted, recorded as refused")
    return TableCheck(tuple(record.settings["templates"]), differences=tuple(differences))


def _conversation(template: str, facts: dict[str, Any], case: dict[str, Any]) -> Iterator[str]:
    """What differs in one recorded conversation."""
    rule: PlaceholderRule = "llava_next" if facts["family"] == "llava_next" else "llava"
    moved = [
        {**turn, "value": move_placeholder(turn["value"], rule)} if case["has_image"] else turn
        for turn in case["conversations"]
    ]
    if moved != case["after_multimodal"]:
        yield "placeholders"
    messages = from_llava(case["conversations"], has_image=case["has_image"], rule=rule)
    prompt = render(messages, template)
    if prompt != case["prompt"] or _jinja(template, messages) != case["prompt"]:
        yield "prompt"
    if case["generation_prompt"] is not None:
        opened = render(messages[:-1], template, add_generation_prompt=True)
        in_jinja = _jinja(template, messages[:-1], add_generation_prompt=True)
        if opened != case["generation_prompt"] or in_jinja != case["generation_prompt"]:
            yield "generation prompt"
    content = case["content_only_spans"] if facts["content_only_spans"] else case["spans"]
    if [[*span, prompt[slice(*span)]] for span in prompt.supervised] != content:
        yield "supervised text"
    if facts["family"] == "llava_next":
        official = render_next(messages, template).supervised
        if [[*span, prompt[slice(*span)]] for span in official] != case["spans"]:
            yield "supervised text of the official mask"
    bos = "<|begin_of_text|>"
    text = _jinja(template, messages, bos_token=bos if facts["automatic_bos"] else "")
    count = (len(text) - len(text.removeprefix(bos).removeprefix(bos))) // len(bos)
    if case.get("leading_bos_tokens", count) != count:
        yield "number of BOS tokens"


def _jinja(template: str, messages: list[Message], **variables: Any) -> str:
    """The template as anybody renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    jinja = find_template(template).jinja
    texts, _ = render_jinja_template(conversations=[messages], chat_template=jinja, **variables)
    return str(texts[0])


def _refuses(template: str, messages: list[Message]) -> bool:
    try:
        render(messages, template)
    except ValueError:
        return True
    return False


CASES: dict[str, Case] = {
    "inf.projector": _projector,
    "inf.splice": _splice,
    "inf.conversations": _conversations,
}
