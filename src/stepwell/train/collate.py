"""Samples -> a batch that a StepwellForConditionalGeneration takes, with labels.

The processor that serves a model also prepares its training: one rendering, one count of visual tokens.
Letters: B batch, L length of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepwell.data.sample import Sample, Turn
from stepwell.language.labels import IGNORE, LabelledTokens
from stepwell.language.messages import IMAGE
from stepwell.models.processor import StepwellProcessor

__all__ = ["Collator", "Row", "TurnOrder"]

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
    turns: Sequence[Turn]  # those that fitted


class Collator:
    """Samples of one image each, or none -> a batch, padded at the right: the model's inputs and `labels`.

    A sample longer than max_length tokens loses whole turns, the last first.
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
        rows = [self._row(sample.turns, image) for sample, image in zip(samples, images, strict=True)]
        return rows, images

    def batch(self, rows: Sequence[Row], images: Sequence[Image | None]) -> dict[str, Any]:
        """input_ids and labels (B, L), attention_mask (B, L) or (B, 1, L, L), and what the image processor
        gives.
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
            batch["attention_mask"] = _apart(pad_sequence([row.groups for row in rows], True, -1))
        if present := [image for image in images if image is not None]:
            batch |= self.processor.image_processor(present)
        return batch

    def _row(self, turns: Sequence[Turn], image: Image | None) -> Row:
        write = self._together if self.turns == "together" else self._apart
        parts = write(turns, image)
        while len(parts[0]) > self.max_length:
            if len(turns) == 1:
                raise ValueError(f"one turn takes {len(parts[0])} tokens; max_length is {self.max_length}")
            turns = turns[: max(1, min(len(turns) - 1, len(turns) * self.max_length // len(parts[0])))]
            parts = write(turns, image)
        ids, labels, groups, positions = map(torch.tensor, parts)
        return Row(ids, labels, groups, positions, turns)

    def _together(self, turns: Sequence[Turn], image: Image | None) -> tuple[list[int], ...]:
        """One conversation -> ids, labels, groups, positions."""
        tokens = self._encode(turns, image)
        length = len(tokens.input_ids)
        return tokens.input_ids, tokens.labels, [0] * length, list(range(length))

    def _apart(self, turns: Sequence[Turn], image: Image | None) -> tuple[list[int], ...]:
        """Conversations of one turn each, that share what ends with the image."""
        ids, labels, groups, positions = [], [], [], []
        shared = 0
        for number, turn in enumerate(turns, 1):
            question = turn.question.removeprefix(IMAGE).lstrip("\n")
            alone = replace(turn, question=f"{IMAGE}\n{question}" if image else question)
            tokens = self._encode([alone], image)
            if number == 1:
                if image is not None:
                    reversed_ids = tokens.input_ids[::-1]
                    shared = len(reversed_ids) - reversed_ids.index(self.processor.image_token_id)
                ids, labels = tokens.input_ids[:shared], tokens.labels[:shared]
                groups, positions = [0] * shared, list(range(shared))
            ids += tokens.input_ids[shared:]
            labels += tokens.labels[shared:]
            groups += [number] * (len(tokens.input_ids) - shared)
            positions += range(shared, len(tokens.input_ids))
        return ids, labels, groups, positions

    def _encode(self, turns: Sequence[Turn], image: Image | None) -> LabelledTokens:
        return self.processor.label(_messages(turns, image is not None), [] if image is None else [image])


def _apart(groups: Tensor) -> Tensor:
    """(B, L) -> (B, 1, L, L), True where a query (third axis) may look: back, at group 0 and at its own."""
    same = (groups[:, None, :] == groups[:, :, None]) | (groups[:, None, :] == 0)
    return same.tril()[:, None]


def _messages(turns: Sequence[Turn], has_image: bool) -> list[dict[str, Any]]:
    """Without an image, a placeholder in a question is text like any other."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        question = turn.question if has_image else [{"type": "text", "text": turn.question}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
    return messages
