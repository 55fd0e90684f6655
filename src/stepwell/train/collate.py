"""Samples -> a batch that a StepwellForConditionalGeneration takes, with labels.

The processor that serves a model also prepares its training: one rendering, one count of visual tokens.
Letters: B batch, L length of the longest row, P pixels of all inputs.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from stepwell.data.sample import Sample
from stepwell.images.limits import DEFAULT_LIMITS, ImageError, ImageLimits
from stepwell.images.open import ImageSource
from stepwell.language.labels import IGNORE
from stepwell.language.messages import IMAGE, Message
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import NO_REGION, Size
from stepwell.views.region import region_of_fractions

__all__ = ["Averaging", "Collator", "Example", "Row", "TurnOrder", "turn_mask"]

WHOLE, REGIONS = ("pixel_values", "image_sizes"), "image_regions"

TurnOrder = Literal["together", "apart"]
"""A sample is one conversation; or every turn is trained as if it was asked alone, while the image is paid
for once: all turns continue what ends with the image, none sees another.
"""


Averaging = Literal["tokens", "square", "samples"]
"""In a loss, every token weighs alike, so that a page with many answers outweighs a line many times; or every
sample; or a sample as the root of its number of tokens (InternVL 2.5, arXiv 2412.05271, loss reweighting).
"""
_POWERS: Mapping[Averaging, float] = {"tokens": 1.0, "square": 0.5, "samples": 0.0}

_SAMPLE = 1 << 20
"""Groups of a packed row: those of its n-th sample begin at n times this."""


class Row(NamedTuple):
    """A sample as tokens. `groups` is 0 where all of it may look, else the number of the turn."""

    ids: Tensor  # (L,)
    labels: Tensor  # (L,)
    groups: Tensor  # (L,)
    positions: Tensor  # (L,)


class Example(NamedTuple):
    """A sample, rendered and decoded. `images` are what the image processor gives, empty without any:
    pixel_values (P, 3), image_sizes (images, 2), and of images with regions image_regions (images, 4).
    """

    row: Row
    images: Mapping[str, Tensor]


class Collator:
    """Prepares samples, and makes batches of them, padded at the right: the model's inputs and `labels`.
    packed: the samples of a batch stand in one row, where none sees another, so that short ones beside a long
    one cost no padding.

    A sample longer than max_length tokens loses whole turns, the last first, and no more than it must.
    """

    def __init__(
        self,
        processor: StepwellProcessor,
        *,
        max_length: int,
        turns: TurnOrder = "together",
        packed: bool = False,
        averaging: Averaging = "tokens",
        pad_to_multiple_of: int = 1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if processor.template is None:
            raise ValueError("training needs to know what is an answer; give the recipe's model a template")
        self.processor, self.max_length, self.turns, self.limits = processor, max_length, turns, limits
        self.packed, self.averaging, self.pad_to_multiple_of = packed, averaging, pad_to_multiple_of

    def prepare(self, sample: Sample) -> Example:
        """Raises ValueError for an image that cannot be read, a conversation that the template refuses, one
        of which no token is learned, and one whose first turn is too long.
        """
        images = [self._opened(image) for image in sample.images]
        if sample.resize is not None:
            images = [_resized(image, sample.resize((image.height, image.width))) for image in images]
        regions = [
            None if region is None else region_of_fractions(region, (image.height, image.width))
            for image, region in zip(images, sample.regions or [None] * len(images), strict=True)
        ]
        layouts = self.processor.image_processor.layouts(images, regions)
        row, num_shown = self._row(sample.messages, [self.processor.image_tokens(x) for x in layouts])
        if bool((row.labels == IGNORE).all()):
            raise ValueError("no token of this conversation is supervised: nothing is learned from it")
        shown = images[:num_shown]
        return Example(
            row, self.processor.image_processor(shown, layouts=layouts[:num_shown]) if shown else {}
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """input_ids and labels (B, L), attention_mask or, of turns apart and packed rows, `groups` (B, L) for
        `turn_mask`; weights (B, L) of the tokens where these differ; and the images of all, in order.
        """
        rows = [example.row for example in examples]
        weights = [torch.full(row.ids.shape, _token_weight(self.averaging, row)) for row in rows]
        if self.packed:
            rows, weights = [_packed(rows)], [torch.cat(weights)]
        lengths = torch.tensor([len(row.ids) for row in rows])
        longest = math.ceil(int(lengths.max()) / self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(parts: Sequence[Tensor], value: int) -> Tensor:
            found = pad_sequence(list(parts), True, value)
            return F.pad(found, (0, longest - found.shape[1]), value=value)

        batch: dict[str, Any] = {
            "input_ids": padded([row.ids for row in rows], self.processor.tokenizer.pad_token_id or 0),
            "labels": padded([row.labels for row in rows], IGNORE),
        }
        if self.averaging != "tokens":
            batch["weights"] = padded(weights, 0)
        if self.turns == "together" and not self.packed:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        else:
            batch["position_ids"] = padded([row.positions for row in rows], 0)
            batch["groups"] = padded([row.groups for row in rows], -1)
        if present := [example.images for example in examples if example.images]:
            batch |= {name: torch.cat([images[name] for images in present]) for name in WHOLE}
            if any(REGIONS in images for images in present):
                batch[REGIONS] = torch.cat([_regions(images) for images in present])
        return batch

    def _opened(self, source: ImageSource) -> Image:
        try:
            image: Image = self.processor.image_processor.fetch_images(source, limits=self.limits)
        except (ImageError, TypeError) as error:
            if isinstance(source, str | os.PathLike):
                raise ValueError(f"{os.fspath(source)[:200]}: {error}") from None
            raise
        return image

    def _row(self, messages: Sequence[Message], images: Sequence[list[int]]) -> tuple[Row, int]:
        """A row of as many turns as fit, and the number of images that stand in them. images: the ids that
        stand for each.
        """
        first = int(messages[0]["role"] == "system")  # of the turns

        def write(messages: Sequence[Message]) -> tuple[list[int], ...]:
            if self.turns == "apart":
                return self._apart(messages, images)
            return self._together(messages, images[: _placeholders(messages)])

        parts = write(messages)
        if len(parts[0]) > self.max_length:
            fewer = range(1, len(messages) // 2)
            turns = bisect_right(
                fewer, self.max_length, key=lambda n: len(write(messages[: first + 2 * n])[0])
            )
            messages = messages[: first + 2 * max(turns, 1)]
            parts = write(messages)
            if not turns:
                raise ValueError(f"one turn takes {len(parts[0])} tokens; max_length is {self.max_length}")
        shown = len(images) if self.turns == "apart" else min(_placeholders(messages), len(images))
        if shown < min(len(images), 1):
            raise ValueError(f"no turn with an image fits into max_length ({self.max_length})")
        return Row(*map(torch.tensor, parts)), shown

    def _together(self, messages: Sequence[Message], images: Sequence[list[int]]) -> tuple[list[int], ...]:
        """One conversation -> ids, labels, groups, positions."""
        tokens = self.processor.label(messages, image_tokens=images)
        length = len(tokens.input_ids)
        return tokens.input_ids, tokens.labels, [0] * length, list(range(length))

    def _apart(self, messages: Sequence[Message], images: Sequence[list[int]]) -> tuple[list[int], ...]:
        """Conversations of one turn each, that share what ends with the last image."""
        ids, labels, groups, positions = [], [], [], []
        placeholder, shared = self.processor.image_token_id, 0
        first = int(messages[0]["role"] == "system")
        system, turns = messages[:first], messages[first:]
        if len(images) > 1 and turns[0]["content"].count(IMAGE) < len(images):
            raise ValueError(
                f"turns apart share their {len(images)} images: all belong in the first question"
            )
        for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True), 1):
            if images:
                question = {**question, "content": _behind(turns[0]["content"], question["content"])}
            asked = [*system, question, answer]
            if number == 1:
                ids, labels, groups, positions = self._together(asked, images)
                if images:
                    shared = len(ids) - ids[::-1].index(placeholder)
                groups[shared:] = [1] * (len(ids) - shared)
                continue
            # One placeholder stands for an image: its thousands of tokens are there already.
            part = self.processor.label(asked, image_tokens=[[placeholder]] * len(images))
            start = len(part.input_ids) - part.input_ids[::-1].index(placeholder) if images else 0
            ids += part.input_ids[start:]
            labels += part.labels[start:]
            groups += [number] * (len(part.input_ids) - start)
            positions += range(shared, shared + len(part.input_ids) - start)
        return ids, labels, groups, positions


def _token_weight(averaging: Averaging, row: Row) -> float:
    """What each learned token of a row weighs."""
    learned = int((row.labels[1:] != IGNORE).sum())
    return float(max(1, learned) ** (_POWERS[averaging] - 1))


def _packed(rows: Sequence[Row]) -> Row:
    """Rows behind one another. None's first token is learned from what stands before it."""
    labels = [F.pad(row.labels[1:], (1, 0), value=IGNORE) for row in rows]
    groups = [row.groups + number * _SAMPLE for number, row in enumerate(rows)]
    return Row(
        torch.cat([row.ids for row in rows]),
        torch.cat(labels),
        torch.cat(groups),
        torch.cat([row.positions for row in rows]),
    )


def _regions(images: Mapping[str, Tensor]) -> Tensor:
    """(images, 4)."""
    return images.get(REGIONS, torch.tensor([NO_REGION]).expand(len(images["image_sizes"]), -1))


def _resized(image: Image, size: Size) -> Image:
    height, width = size
    return image.resize((width, height))  # bicubic


def _placeholders(messages: Sequence[Message]) -> int:
    contents = (message["content"] for message in messages if message["role"] == "user")
    return sum(content.count(IMAGE) for content in contents if isinstance(content, str))


def _behind(first: str, question: str) -> str:
    """A question as it is asked when nothing was asked before: behind the images of the first one."""
    if question is first and IMAGE in first:
        return first
    before, image, _ = first.rpartition(IMAGE)
    text = question.removeprefix(IMAGE).lstrip("\n")
    return f"{before}{image or IMAGE}\n{text}"


def turn_mask(groups: Tensor) -> Tensor:
    """(B, L) -> attention_mask (B, 1, L, L), True where a query (third axis) may look: back, at its own group
    and at group 0 of its sample.

    The model makes it where it runs: for thousands of tokens it is larger than the images of its batch.
    """
    shared = groups.div(_SAMPLE, rounding_mode="floor") * _SAMPLE
    same = (groups[:, None, :] == groups[:, :, None]) | (groups[:, None, :] == shared[:, :, None])
    return same.tril()[:, None]
