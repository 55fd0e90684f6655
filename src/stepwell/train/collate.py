"""Samples -> a batch that a StepwellForConditionalGeneration takes, and what the auxiliary losses need.

The processor that serves a model also prepares its training: one rendering, one count of visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepwell.data.sample import Sample, Turn
from stepwell.images.open import open_image
from stepwell.language.labels import IGNORE, LabelledTokens, label_tokens
from stepwell.language.prompt import IMAGE, render
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import TokenLayout
from stepwell.train.line_head import frames_along
from stepwell.train.pointer import Pointers

__all__ = ["Collator", "Row"]

Parts = tuple[list[int], list[int], list[int], list[int]]


class Row(NamedTuple):
    """A sample as tokens. `groups` is 0 where all may look, else the number of the turn (see Collator)."""

    ids: Tensor  # (L,)
    labels: Tensor  # (L,)
    groups: Tensor  # (L,)
    positions: Tensor  # (L,)
    pointers: Pointers


class Collator:
    """Samples of one picture each, or none -> a batch, padded at the right.

    turns "together" makes a sample one conversation. "apart" trains every turn as if it was asked alone,
    while the picture is paid for once: all turns continue what ends with the picture, none sees another.

    Beside the model's inputs a batch holds `labels`; `pointers`, one a row; `grids` and `frames`, one a
    picture (frames are None where frame_step is). A sample longer than max_length tokens loses whole turns,
    the last first.
    """

    def __init__(
        self,
        processor: StepwellProcessor,
        *,
        max_length: int,
        turns: Literal["together", "apart"] = "together",
        frame_step: float | None = None,
    ) -> None:
        """frame_step: pixels of the last view between two frames of a line."""
        if processor.template is None:
            raise ValueError("training needs to know what is an answer; give the recipe's model a template")
        self.processor, self.template = processor, processor.template
        self.max_length, self.turns = max_length, turns
        self.frame_step = frame_step

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        pictures = [None if sample.image is None else _picture(sample.image) for sample in samples]
        shown = [(s, picture) for s, picture in zip(samples, pictures, strict=True) if picture is not None]
        layouts = [None if picture is None else self._layout(picture) for picture in pictures]
        seen = [layout for layout in layouts if layout is not None]
        rows = [self._row(sample, layout) for sample, layout in zip(samples, layouts, strict=True)]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence([row.ids for row in rows], True, self.processor.tokenizer.pad_token_id),
            "labels": pad_sequence([row.labels for row in rows], True, IGNORE),
            "pointers": [row.pointers for row in rows],
            "grids": [layout.views[-1].grid for layout in seen],
            "frames": None,
        }
        if self.turns == "together":
            lengths = torch.tensor([len(row.ids) for row in rows])
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        else:
            batch["position_ids"] = pad_sequence([row.positions for row in rows], True)
            batch["attention_mask"] = _apart(pad_sequence([row.groups for row in rows], True, -1))
        if shown:
            batch |= self.processor.image_processor([picture for _, picture in shown])
        if self.frame_step is not None:
            batch["frames"] = [
                frames_along(sample.lines, layout.image_size, step=self.frame_step * _shrinkage(layout))
                for (sample, _), layout in zip(shown, seen, strict=True)
            ]
        return batch

    def _layout(self, picture: Image.Image) -> TokenLayout:
        return self.processor.geometry.layout((picture.height, picture.width))

    def _row(self, sample: Sample, layout: TokenLayout | None) -> Row:
        turns = list(sample.turns)
        write = self._together if self.turns == "together" else self._apart
        parts = write(turns, layout)
        while len(parts[0]) > self.max_length:
            if len(turns) == 1:
                raise ValueError(f"one turn takes {len(parts[0])} tokens; max_length is {self.max_length}")
            turns = turns[: max(1, min(len(turns) - 1, len(turns) * self.max_length // len(parts[0])))]
            parts = write(turns, layout)
        ids, labels, groups, positions = map(torch.tensor, parts)
        return Row(ids, labels, groups, positions, self._pointers(ids, labels, turns, layout))

    def _together(self, turns: Sequence[Turn], layout: TokenLayout | None) -> Parts:
        """One conversation -> ids, labels, groups, positions."""
        tokens = self._encode(turns, layout)
        length = len(tokens.input_ids)
        return tokens.input_ids, tokens.labels, [0] * length, list(range(length))

    def _apart(self, turns: Sequence[Turn], layout: TokenLayout | None) -> Parts:
        """Conversations of one turn each, that share what ends with the picture."""
        ids, labels, groups, positions = [], [], [], []
        shared = 0
        for number, turn in enumerate(turns, 1):
            question = turn.question.removeprefix(IMAGE).lstrip("\n")
            alone = replace(turn, question=f"{IMAGE}\n{question}" if layout else question)
            tokens = self._encode([alone], layout)
            if number == 1:
                if layout is not None:
                    shared = len(tokens.input_ids) - tokens.input_ids[::-1].index(
                        self.processor.image_token_id
                    )
                ids, labels = tokens.input_ids[:shared], tokens.labels[:shared]
                groups, positions = [0] * shared, list(range(shared))
            ids += tokens.input_ids[shared:]
            labels += tokens.labels[shared:]
            groups += [number] * (len(tokens.input_ids) - shared)
            positions += range(shared, len(tokens.input_ids))
        return ids, labels, groups, positions

    def _encode(self, turns: Sequence[Turn], layout: TokenLayout | None) -> LabelledTokens:
        rendered = render(self.template, _messages(turns, layout is not None))
        pictures = [] if layout is None else [self.processor.image_tokens(layout)]
        return label_tokens(rendered, self.processor.tokenizer, pictures)

    def _pointers(
        self, ids: Tensor, labels: Tensor, turns: Sequence[Turn], layout: TokenLayout | None
    ) -> Pointers:
        """For answers that take one token a character and one for the end: where each character stands."""
        positions: list[int] = []
        cells: list[int] = []
        runs = [
            list(run) for kept, run in groupby(range(len(labels)), lambda i: int(labels[i]) != IGNORE) if kept
        ]
        for run, turn in zip(runs, turns, strict=False):
            line = turn.line
            if layout is None or line is None or len(run) != len(line.text) + 1:
                continue
            (height, width), (rows, cols) = layout.image_size, layout.views[-1].grid
            row = _cell((line.box[1] + line.box[3]) / 2, height, rows)
            middles = [(left + right) / 2 for left, right in zip(line.edges, line.edges[1:], strict=False)]
            positions += [place - 1 for place in run[:-1]]
            cells += [row * cols + _cell(middle, width, cols) for middle in middles]
        visual = (ids == self.processor.image_token_id).nonzero()[:, 0]
        return Pointers(torch.tensor(positions).long(), torch.tensor(cells).long(), visual)


def _apart(groups: Tensor) -> Tensor:
    """(B, L) -> (B, 1, L, L), True where a query (third axis) may look: back, at group 0 and at its own."""
    same = (groups[:, None, :] == groups[:, :, None]) | (groups[:, None, :] == 0)
    return same.tril()[:, None]


def _messages(turns: Sequence[Turn], has_image: bool) -> list[dict[str, Any]]:
    """Without a picture, a placeholder in a question is text like any other."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        question = turn.question if has_image else [{"type": "text", "text": turn.question}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
    return messages


def _picture(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_image(image)


def _shrinkage(layout: TokenLayout) -> float:
    """Pixels of the source picture in one pixel of the last view."""
    return layout.image_size[1] / layout.views[-1].size[1]


def _cell(at: float, side: float, cells: int) -> int:
    """The cell of a coordinate on a side of so many pixels; what lies outside counts to the border."""
    return min(max(int(at / side * cells), 0), cells - 1)
