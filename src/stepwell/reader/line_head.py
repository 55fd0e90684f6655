"""Dense supervision for an encoder that learns to read: what character stands in every narrow column of a
line.

Not a paper's part, and not a part of any model: it lives as long as a training stage. Along each line, the
map of the finest view is sampled at short steps and classified: where the edges of characters are known, each
frame for itself ("frame" cross-entropy), and where only the text is, all of a line together (connectionist
temporal classification: Graves et al., ICML 2006).
Letters: F frames of all lines, L lines, D width of the map, (h, w) its grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepwell.reader.page import Line
from stepwell.structures import Box, Size

__all__ = [
    "ALPHABET",
    "Frames",
    "LineHead",
    "Points",
    "Spelled",
    "ctc_loss",
    "frame_loss",
    "frames_along",
    "spelled_along",
]

ALPHABET = "".join(chr(code) for code in range(33, 127) if not chr(code).islower())


class Points(TypedDict):
    """Points on the lines that a view shows."""

    points: Tensor  # (F, 2) x and y as fractions of what the view shows
    heights: Tensor  # (F,) height of the line as a fraction of the height of that


class Frames(Points):
    """What stands at each point."""

    classes: Tensor  # (F,) index into the alphabet, 0 for blank


class Spelled(Points):
    """What the points of each line spell together."""

    lengths: Tensor  # (L,) points of each line
    targets: Tensor  # (T,) indices into the alphabet, from 1, of all lines' characters
    target_lengths: Tensor  # (L,) characters of each line


def frames_along(
    lines: Sequence[Line], box: Box, *, step: float, spread: bool = False, alphabet: str = ALPHABET
) -> Frames:
    """Frames every `step` pixels along the lines with exact edges, where they lie in `box`, which is what the
    view shows in pixels of the image; spread: also along those whose edges are only spread evenly.

    Class 0 is a blank or a character outside the alphabet; the others count from 1.
    """
    points: list[tuple[float, float]] = []
    heights: list[float] = []
    classes: list[int] = []
    for line in lines:
        if not (line.exact or spread) or not _is_seen(line, box):
            continue
        character = 0
        for x in _steps(line, step):
            while character < len(line.text) - 1 and line.edges[character + 1] <= x:
                character += 1
            if box[0] <= x < box[2]:
                points.append((x, line.middle(x)))
                heights.append(line.height)
                classes.append(alphabet.find(line.text[character]) + 1)
    return Frames(**_points(points, heights, box), classes=torch.tensor(classes).long())


def spelled_along(lines: Sequence[Line], box: Box, *, step: float, alphabet: str = ALPHABET) -> Spelled:
    """Points every `step` pixels along all lines that lie in `box` whole, and their texts without blanks and
    characters outside the alphabet. A line with fewer points than its text needs is left out.
    """
    points: list[tuple[float, float]] = []
    heights: list[float] = []
    lengths, targets, target_lengths = [], [], []
    for line in lines:
        spelled = [alphabet.find(character) + 1 for character in line.text]
        spelled = [target for target in spelled if target]
        places = _steps(line, step)
        least = len(spelled) + sum(a == b for a, b in pairwise(spelled))  # a blank parts two alike
        slack = line.height / 2
        within = box[0] <= line.edges[0] + slack and line.edges[-1] - slack <= box[2]
        if not within or not _is_seen(line, box) or not 0 < least <= len(places):
            continue
        points += [(x, line.middle(x)) for x in places]
        heights += [line.height] * len(places)
        lengths.append(len(places))
        targets += spelled
        target_lengths.append(len(spelled))
    return Spelled(
        **_points(points, heights, box),
        lengths=torch.tensor(lengths).long(),
        targets=torch.tensor(targets).long(),
        target_lengths=torch.tensor(target_lengths).long(),
    )


def _steps(line: Line, step: float) -> list[float]:
    """Columns in the middle of every step along a line."""
    start, end = line.edges[0], line.edges[-1]
    return [start + step * (i + 0.5) for i in range(math.ceil((end - start) / step - 0.5))]


def _is_seen(line: Line, box: Box) -> bool:
    """Whether a line is not cut off at its top or bottom."""
    slack = 0.2 * line.height
    return line.box[1] >= box[1] - slack and line.box[3] <= box[3] + slack


def _points(points: Sequence[tuple[float, float]], heights: Sequence[float], box: Box) -> Points:
    left, top, right, bottom = box
    size = torch.tensor([right - left, bottom - top])
    places = torch.tensor(points, dtype=torch.float32).reshape(-1, 2)
    return Points(
        points=(places - torch.tensor([left, top])) / size,
        heights=torch.tensor(heights, dtype=torch.float32) / size[1],
    )


class LineHead(nn.Module):
    """Classifies frames from the cells of a map.

    A frame looks at three places, above, on and below the middle of its line, where each blends the two rows
    of cells that it lies between. It takes the upright strip of them that it falls on, of `num_columns` of a
    cell, and knows how tall its line is.
    """

    _HEIGHTS = (-0.3, 0.0, 0.3)  # of a line, from its middle

    def __init__(
        self, dim: int, *, num_classes: int = len(ALPHABET) + 1, num_columns: int = 4, hidden_dim: int = 128
    ) -> None:
        super().__init__()
        self.num_columns = num_columns
        self.unfold = nn.Linear(len(self._HEIGHTS) * dim, num_columns * hidden_dim)
        self.place = nn.Linear(3, hidden_dim)
        nn.init.normal_(self.place.weight, std=0.02)  # what is seen counts more from the first step on
        self.norm = nn.Sequential(nn.LayerNorm(hidden_dim), nn.ReLU())
        self.read = nn.Linear(hidden_dim, num_classes)
        self.spell = nn.Linear(hidden_dim, num_classes)

    def forward(self, tokens: Tensor, grid: Size, frames: Points, *, spelled: bool = False) -> Tensor:
        """tokens (h*w, D), the cells of one map, row-major; grid = (h, w) -> logits (F, num_classes) of the
        frames, or those whose frames spell a line together, where class 0 parts characters.
        """
        rows, cols = grid
        cells = tokens.unflatten(0, grid)
        x, y = frames["points"].unbind(1)
        strip = (x * cols * self.num_columns).long().clamp(0, cols * self.num_columns - 1)
        column = strip // self.num_columns
        seen = [_blended(cells, y + share * frames["heights"], column) for share in self._HEIGHTS]
        strips = self.unfold(torch.cat(seen, dim=1)).unflatten(1, (self.num_columns, -1))
        own = strips[torch.arange(len(strip), device=strip.device), strip % self.num_columns]
        down = (y * rows - 0.5) % 1
        place = torch.stack([down, down**2, frames["heights"] * rows], dim=1)
        hidden = self.norm(own + self.place(place.to(own.dtype)))
        logits: Tensor = self.spell(hidden) if spelled else self.read(hidden)
        return logits


def _blended(cells: Tensor, y: Tensor, column: Tensor) -> Tensor:
    """cells (h, w, D) at fractions y (F,) of their height, in columns (F,) -> (F, D)."""
    rows = len(cells)
    down = (y * rows - 0.5).clamp(0, rows - 1)
    row = down.long()
    share = (down - row)[:, None].to(cells.dtype)
    return (1 - share) * cells[row, column] + share * cells[(row + 1).clamp(max=rows - 1), column]


def frame_loss(head: LineHead, tokens: Tensor, grid: Size, frames: Frames) -> Tensor:
    """Mean cross-entropy over the frames of one image, fp32."""
    return F.cross_entropy(head(tokens, grid, frames).float(), frames["classes"])


def ctc_loss(head: LineHead, tokens: Tensor, grid: Size, spelled: Spelled) -> Tensor:
    """Mean over the lines of one image of the negative log-likelihood a character, fp32."""
    logits = head(tokens, grid, spelled, spelled=True).float()
    lines = pad_sequence(list(logits.split(spelled["lengths"].tolist())))
    return F.ctc_loss(lines.log_softmax(2), spelled["targets"], spelled["lengths"], spelled["target_lengths"])
