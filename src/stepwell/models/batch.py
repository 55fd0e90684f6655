"""Rows of tokens -> a batch, as the options of a call want it. The options are transformers'.

Letters: B rows, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from stepwell.language.labels import IGNORE, LabelledTokens

__all__ = ["TextOptions", "token_batch"]

_ENDLESS = 1 << 32  # a tokenizer of no model_max_length has a huge one
_GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "padding": (True, False, "longest", "max_length", "do_not_pad"),
    "padding_side": ("left", "right", None),
    "sanitize_control_tokens": (True,),  # what people wrote stays text in any case
    "truncation": (True, False, "longest_first", "do_not_truncate"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """Raises ValueError for a value that is not known, and a max_length that nothing looks at."""

    add_special_tokens: bool = True  # to texts that no chat template wrote
    max_length: int | None = None  # None: the tokenizer's
    pad_to_multiple_of: int | None = None
    padding: bool | str = False
    padding_side: str | None = None  # None: the tokenizer's
    return_assistant_tokens_mask: bool = False
    return_mm_token_type_ids: bool = False
    return_tensors: str | None = None
    sanitize_control_tokens: bool = True
    truncation: bool | str = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {choices}, got {getattr(self, name)!r}")
        if self.max_length is not None and not self.truncates and self.padding != "max_length":
            raise ValueError(f"max_length={self.max_length} needs truncation=True or padding='max_length'")

    @property
    def truncates(self) -> bool:
        return self.truncation in (True, "longest_first")

    @property
    def pads(self) -> bool:
        return self.padding not in (False, "do_not_pad")

    @classmethod
    def read(cls, keywords: Mapping[str, Any]) -> TextOptions:
        """Keywords of a call, flat or in transformers' groups; what is None counts as left out."""
        common, text, images = (keywords.get(group) or {} for group in _GROUPS)
        flat = {name: value for name, value in keywords.items() if name not in _GROUPS}
        options = {name: v for name, v in {**images, **flat, **common, **text}.items() if v is not None}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(options.keys() - known | images.keys() - {"return_tensors"}):
            raise ValueError(
                f"StepwellProcessor knows no {', '.join(map(repr, unknown))}; check the spelling"
            )
        return cls(**options)


def token_batch(
    rows: Sequence[LabelledTokens], tokenizer: Any, image_token_id: int, options: TextOptions
) -> dict[str, list[list[int]]]:
    """input_ids and attention_mask (B, L), and assistant_masks and mm_token_type_ids where asked for.

    Raises ValueError where truncation would cut an image.
    """
    max_length = options.max_length or tokenizer.model_max_length
    if options.truncates:
        window = slice(-max_length, None) if tokenizer.truncation_side == "left" else slice(max_length)
        rows = [_cut(row, window, max_length, image_token_id) for row in rows]
    width = max((len(row.input_ids) for row in rows), default=0) if options.pads else 0
    if options.padding == "max_length":
        if max_length > _ENDLESS:
            raise ValueError("padding='max_length' needs a max_length: the tokenizer has none")
        width = max(width, max_length)
    if options.pads and options.pad_to_multiple_of:
        width += -width % options.pad_to_multiple_of
    on_the_left = (options.padding_side or tokenizer.padding_side) == "left"

    def padded(row: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(row))
        return padding + row if on_the_left else row + padding

    batch = {
        "input_ids": [padded(row.input_ids, tokenizer.pad_token_id or 0) for row in rows],
        "attention_mask": [padded([1] * len(row.input_ids), 0) for row in rows],
    }
    if options.return_assistant_tokens_mask:
        batch["assistant_masks"] = [padded([int(i != IGNORE) for i in row.labels], 0) for row in rows]
    if options.return_mm_token_type_ids:
        batch["mm_token_type_ids"] = [[int(i == image_token_id) for i in ids] for ids in batch["input_ids"]]
    return batch


def _cut(row: LabelledTokens, window: slice, max_length: int, image_token_id: int) -> LabelledTokens:
    if row.input_ids[window].count(image_token_id) != row.input_ids.count(image_token_id):
        raise ValueError(
            f"a text takes {len(row.input_ids)} tokens; truncation to {max_length} would cut an image: "
            "raise max_length, or show smaller or fewer images"
        )
    return LabelledTokens(row.input_ids[window], row.labels[window])
