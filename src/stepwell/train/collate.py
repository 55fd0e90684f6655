"""Samples -> a batch that a StepwellForConditionalGeneration takes, with labels.

The processor that serves a model also prepares its training: one rendering, one count of visual tokens.
Letters: B batch, L length of the longest row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepwell.data.sample import Sample
from stepwell.language.labels import IGNORE
from stepwell.language.messages import IMAGE, Message
from stepwell.models.processor import StepwellProcessor

__all__ = ["Collator", "Row", "TurnOrder", "turn_mask"]

TurnOrder = Literal["together", "apart"]
"""A sample is one conversation; or every turn is trained as if it was asked alone, while the image is paid
for once: all turns continue what ends with the image, none sees another.
"""


class Row(NamedTuple):
    """A sample as tokens. `groups` is 0 where all may look, else the number of the turn."""

    ids: Tensor  # (L,)
    labels: Tensor  # (L,)
    groups: Tensor  # (L,)
    positions: Tensor  # (L,)


class Collator:
    """Samples of one image each, or none -> a batch, padded at the right: the model's inputs and `labels`.

    A sample longer than max_length tokens loses whole turns, the last first, and no more than it must.
    """

    def __init__(
        self, processor: StepwellProcessor, *, max_length: int, turns: TurnOrder = "together"
    ) -> None:
        if processor.template is None:
            raise ValueError("training needs to know what is an answer; give the recipe's model a template")
        self.processor, self.max_length, self.turns = processor, max_length, turns

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.batch(*self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> tuple[list[Row], list[Image | None]]:
        """A row and the opened image of each sample."""
        fetch = self.processor.image_processor.fetch_images
        images = [None if sample.image is None else fetch(sample.image) for sample in samples]
        rows = [self._row(sample.messages, image) for sample, image in zip(samples, images, strict=True)]
        return rows, images

    def batch(self, rows: Sequence[Row], images: Sequence[Image | None]) -> dict[str, Any]:
        """input_ids and labels (B, L), attention_mask or, of turns apart, `groups` (B, L) for `turn_mask`;
        and what the image processor gives.
        """
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(
                [row.ids for row in rows], True, self.processor.tokenizer.pad_token_id or 0
            ),
            "labels": pad_sequence([row.labels for row in rows], True, IGNORE),
        }
        if self.turns == "together":
            lengths = torch.tensor([len(row.ids) for row in rows])
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        else:
            batch["position_ids"] = pad_sequence([row.positions for row in rows], True)
            batch["groups"] = pad_sequence([row.groups for row in rows], True, -1)
        if present := [image for image in images if image is not None]:
            batch |= self.processor.image_processor(present)
        return batch

    def _row(self, messages: Sequence[Message], image: Image | None) -> Row:
        write = self._together if self.turns == "together" else self._apart
        parts = write(messages, image)
        if len(parts[0]) > self.max_length:
            fewer = range(1, len(messages) // 2)
            turns = bisect_right(
                fewer, self.max_length, key=lambda n: len(write(messages[: 2 * n], image)[0])
            )
            parts = write(messages[: 2 * max(turns, 1)], image)
            if not turns:
                raise ValueError(f"one turn takes {len(parts[0])} tokens; max_length is {self.max_length}")
        return Row(*map(torch.tensor, parts))

    def _together(self, messages: Sequence[Message], image: Image | None) -> tuple[list[int], ...]:
        """One conversation -> ids, labels, groups, positions."""
        tokens = self.processor.label(messages, [] if image is None else [image])
        length = len(tokens.input_ids)
        return tokens.input_ids, tokens.labels, [0] * length, list(range(length))

    def _apart(self, messages: Sequence[Message], image: Image | None) -> tuple[list[int], ...]:
        """Conversations of one turn each, that share what ends with the image."""
        ids, labels, groups, positions = [], [], [], []
        placeholder, shared = self.processor.image_token_id, 0
        for number, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True), 1):
            if image is not None:
                text = question["content"].removeprefix(IMAGE).lstrip("\n")
                question = {**question, "content": f"{IMAGE}\n{text}"}
            if number == 1:
                ids, labels, groups, positions = self._together([question, answer], image)
                if image is not None:
                    shared = len(ids) - ids[::-1].index(placeholder)
                groups[shared:] = [1] * (len(ids) - shared)
                continue
            images = [] if image is None else [image]
            # One placeholder stands for the image: its thousands of tokens are there already.
            part = self.processor.label(
                [question, answer], images, image_tokens=[[placeholder]] * len(images)
            )
            start = part.input_ids.index(placeholder) + 1 if images else 0
            ids += part.input_ids[start:]
            labels += part.labels[start:]
            groups += [number] * (len(part.input_ids) - start)
            positions += range(shared, shared + len(part.input_ids) - start)
        return ids, labels, groups, positions


def turn_mask(groups: Tensor) -> Tensor:
    """(B, L) -> attention_mask (B, 1, L, L), True where a query (third axis) may look: back, at group 0 and
    at its own group.

    The model makes it where it runs: for thousands of tokens it is larger than the images of its batch.
    """
    same = (groups[:, None, :] == groups[:, :, None]) | (groups[:, None, :] == 0)
    return same.tril()[:, None]
