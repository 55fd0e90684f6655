"""Which head of a language model reads: it looks at one place for one token, and beside it for the next.

Most heads look at nothing in particular, and some at the same few tokens whatever is written, so that the
mean of all hides the ones that point. Who spells what stands in an image steps along its line, and that is
told from attention alone, without knowing how a model was trained. Letters: h heads, n tokens of the answer,
N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell.structures import TokenLayout

__all__ = ["Places", "places_of", "reading_scores"]

REACH = 2.0
"""Cells each way that a step along a line goes at most."""


class Places(NamedTuple):
    """Of visual tokens: where their cells lie, in source pixels; NaN for tokens without a place."""

    centres: Tensor  # (N, 2): x and y
    sizes: Tensor  # (N, 2): width and height
    images: Tensor  # (N,): number of the image


def places_of(layouts: Sequence[TokenLayout]) -> Places:
    """Of the visual tokens of all images in order. A token with several cells is told by the last."""
    centres, sizes, images = [], [], []
    for number, layout in enumerate(layouts):
        of_image = torch.full((layout.num_visual + 1, 4), torch.nan)  # the last one is for cells without
        for (left, top, right, bottom), rows in layout.grids:
            tokens = torch.tensor([list(row) for row in rows])
            height, width = (bottom - top) / tokens.shape[0], (right - left) / tokens.shape[1]
            down, across = torch.meshgrid(*map(torch.arange, tokens.shape), indexing="ij")
            cells = torch.stack([left + (across + 0.5) * width, top + (down + 0.5) * height], -1)
            size = torch.tensor([width, height]).expand_as(cells)
            of_image[tokens.flatten()] = torch.cat([cells, size], -1).flatten(0, 1).to(of_image)
        centres.append(of_image[:-1, :2])
        sizes.append(of_image[:-1, 2:])
        images += [number] * layout.num_visual
    return Places(torch.cat(centres), torch.cat(sizes), torch.tensor(images))


def reading_scores(rows: Tensor, places: Places) -> Tensor:
    """rows (h, n, N), of the tokens of an answer without that which ends it -> (h,): how much of each head's
    attention lies at its peak, times the share of steps, from one token's peak to the next one's, that go to
    another cell and at most `REACH` cells far. Zeros for a single token, which no step leads to.
    """
    if rows.shape[1] < 2:
        return rows.new_zeros(len(rows))
    weights, peaks = rows.max(-1)
    peaks = peaks.cpu()
    steps = (places.centres[peaks[:, 1:]] - places.centres[peaks[:, :-1]]).abs()
    near = (steps <= (REACH + 0.01) * places.sizes[peaks[:, 1:]]).all(-1)  # NaN is not near
    near &= places.images[peaks[:, 1:]] == places.images[peaks[:, :-1]]
    moved = peaks[:, 1:] != peaks[:, :-1]
    return weights.mean(1) * (near & moved).float().mean(1).to(weights)
