"""Dense supervision for an encoder that learns to read: what character stands in every narrow column of a
line.

Not a paper's part, and not a part of any model: it lives as long as a training stage. Along each line whose
character edges are known, visual tokens are sampled at short steps and classified ("frame" cross-entropy).
Letters: F frames of all lines, D width of the visual tokens, (h, w) their grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.reader.page import Line
from stepwell.structures import Size

__all__ = ["ALPHABET", "Frames", "LineHead", "frame_loss", "frames_along"]

ALPHABET = "".join(chr(code) for code in range(33, 127) if not chr(code).islower())


class Frames(TypedDict):
    """Points on the lines of one image, and what stands there."""

    points: Tensor  # (F, 2) x and y as fractions of the image
    heights: Tensor  # (F,) height of the line as a fraction of the image's height
    classes: Tensor  # (F,) index into the alphabet, 0 for blank


def frames_along(lines: Sequence[Line], size: Size, *, step: float, alphabet: str = ALPHABET) -> Frames:
    """Frames every `step` pixels along the lines with exact edges; size = (H, W) of the image.

    Class 0 is a blank or a character outside the alphabet; the others count from 1.
    """
    height, width = size
    points, heights, classes = [], [], []
    for line in lines:
        if not line.exact:
            continue
        x, character = line.edges[0] + step / 2, 0
        while x < line.edges[-1]:
            while line.edges[character + 1] <= x:
                character += 1
            points.append((x / width, line.middle(x) / height))
            heights.append(line.height / height)
            classes.append(alphabet.find(line.text[character]) + 1)
            x += step
    return Frames(
        points=torch.tensor(points, dtype=torch.float32).reshape(-1, 2),
        heights=torch.tensor(heights),
        classes=torch.tensor(classes).long(),
    )


class LineHead(nn.Module):
    """Classifies frames from visual tokens.

    Every token is unfolded into `num_columns` upright strips of its cell; a frame takes the strip it falls
    on, blended between the two rows of cells that its height lies between, and knows how tall its line is.
    """

    def __init__(
        self, dim: int, *, num_classes: int = len(ALPHABET) + 1, num_columns: int = 4, hidden_dim: int = 128
    ) -> None:
        super().__init__()
        self.num_columns = num_columns
        self.unfold = nn.Linear(dim, num_columns * hidden_dim)
        self.place = nn.Linear(3, hidden_dim)
        self.read = nn.Sequential(nn.LayerNorm(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_classes))

    def forward(self, tokens: Tensor, grid: Size, frames: Frames) -> Tensor:
        """tokens (h*w, D) of one image, row-major; grid = (h, w) -> logits (F, num_classes)."""
        rows, cols = grid
        strips = self.unfold(tokens).unflatten(0, grid).unflatten(2, (self.num_columns, -1)).flatten(1, 2)
        x, y = frames["points"].unbind(1)
        strip = (x * cols * self.num_columns).long().clamp(0, cols * self.num_columns - 1)
        down = (y * rows - 0.5).clamp(0, rows - 1)
        row = down.long().clamp(max=max(rows - 2, 0))
        share = (down - row)[:, None].to(strips.dtype)
        seen = (1 - share) * strips[row, strip] + share * strips[(row + 1).clamp(max=rows - 1), strip]
        place = torch.stack([down - row, (down - row) ** 2, frames["heights"] * rows], dim=1)
        return self.read(seen + self.place(place.to(seen.dtype)))  # type: ignore[no-any-return]


def frame_loss(head: LineHead, tokens: Tensor, grid: Size, frames: Frames) -> Tensor:
    """Mean cross-entropy over the frames of one image, fp32."""
    return F.cross_entropy(head(tokens, grid, frames).float(), frames["classes"])
