"""Samples -> a batch that a StepwellForConditionalGeneration takes, with what the auxiliary losses need
beside it.

The processor that serves a model also prepares its training: one rendering, one count of visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepwell.data.sample import Sample, Turn
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import TokenLayout
from stepwell.train.line_head import frames_along
from stepwell.train.pointer import Pointers
from stepwell.views.decode import open_image

__all__ = ["IGNORED", "Collator"]

IGNORED = -100  # the label that torch's cross-entropy leaves out


class Collator:
    """Samples of one picture each, or none -> a batch, padded at the right.

    Beside the model's inputs a batch holds `labels`; `pointers`, one a row; `grids` and `frames`, one a
    picture (frames are None where frame_step is). A sample longer than max_length tokens loses whole turns,
    the last first.
    """

    def __init__(
        self, processor: StepwellProcessor, *, max_length: int, frame_step: float | None = None
    ) -> None:
        """frame_step: pixels of the last view between two frames of a line."""
        if processor.template is None:
            raise ValueError("training needs to know what is an answer; give the recipe's model a template")
        self.processor, self.max_length, self.frame_step = processor, max_length, frame_step

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        pictures = [None if sample.image is None else _picture(sample.image) for sample in samples]
        shown = [
            (sample, picture)
            for sample, picture in zip(samples, pictures, strict=True)
            if picture is not None
        ]
        layouts = [self._layout(picture) for _, picture in shown]
        rows = [self._row(sample, picture) for sample, picture in zip(samples, pictures, strict=True)]
        lengths = torch.tensor([len(ids) for ids, _, _ in rows])
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(
                [ids for ids, _, _ in rows], True, self.processor.tokenizer.pad_token_id
            ),
            "labels": pad_sequence([labels for _, labels, _ in rows], True, IGNORED),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "pointers": [pointers for _, _, pointers in rows],
            "grids": [layout.views[-1].grid for layout in layouts],
            "frames": None,
        }
        if shown:
            batch |= self.processor.image_processor([picture for _, picture in shown])
        if self.frame_step is not None:
            batch["frames"] = [
                frames_along(sample.lines, layout.image_size, step=self.frame_step * _shrinkage(layout))
                for (sample, _), layout in zip(shown, layouts, strict=True)
            ]
        return batch

    def _layout(self, picture: Image.Image) -> TokenLayout:
        return self.processor.geometry.layout((picture.height, picture.width))

    def _row(self, sample: Sample, picture: Image.Image | None) -> tuple[Tensor, Tensor, Pointers]:
        """-> token ids (L,), labels (L,), pointers."""
        turns = list(sample.turns)
        images = [] if picture is None else [picture]
        tokens, _ = self.processor.encode(_messages(turns, bool(images)), images)
        while len(tokens.input_ids) > self.max_length:
            if len(turns) == 1:
                raise ValueError(
                    f"one turn takes {len(tokens.input_ids)} tokens; max_length is {self.max_length}"
                )
            turns = turns[
                : max(1, min(len(turns) - 1, len(turns) * self.max_length // len(tokens.input_ids)))
            ]
            tokens, _ = self.processor.encode(_messages(turns, bool(images)), images)
        ids, labels = torch.tensor(tokens.input_ids), torch.tensor(tokens.labels)
        layout = None if picture is None else self._layout(picture)
        return ids, labels, self._pointers(ids, labels, turns, layout)

    def _pointers(
        self, ids: Tensor, labels: Tensor, turns: Sequence[Turn], layout: TokenLayout | None
    ) -> Pointers:
        """For answers that take one token a character and one for the end: where each character stands."""
        positions: list[int] = []
        cells: list[int] = []
        runs = [
            list(run)
            for kept, run in groupby(range(len(labels)), lambda i: int(labels[i]) != IGNORED)
            if kept
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
