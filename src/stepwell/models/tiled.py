"""A picture far larger than a model's view, looked at tile by tile: objects, or a class for every pixel.

Tiles are cut when their turn comes, from a picture that is decoded once; of logits no more is held than what
waits for its neighbours. Letters: K classes, (H, W) the picture, (h, w) a tile as the model sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

import torch
from PIL.Image import Image
from torch import Tensor

from stepwell.heads.sliding import class_map
from stepwell.models.predictions import Detections, label_dtype
from stepwell.models.seams import join_across_seams
from stepwell.ops.sliding_windows import Window
from stepwell.structures import Size
from stepwell.views.tiling import Tile, scaled_window

__all__ = ["detect_in_tiles", "label_in_tiles"]

Run = Callable[[list[Image], list[Size]], Sequence[Detections]]
RunLogits = Callable[[list[Image], list[Size]], Sequence[Tensor]]


def detect_in_tiles(image: Image, tiles: Sequence[Tile], run: Run, *, batch: int) -> Detections:
    """run: pictures, and the sizes in which the model is to see them -> what is in each, in its own pixels.

    Of the whole picture every object once, best first.
    """
    size, found = (image.height, image.width), []
    for first in range(0, len(tiles), batch):
        part = tiles[first : first + batch]
        for tile, seen in zip(part, run(*_cut(image, part)), strict=True):
            found.append(_moved(seen, tile.source, size))
    return join_across_seams(found, [tile.source for tile in tiles], size)


def label_in_tiles(
    image: Image, tiles: Sequence[Tile], run: RunLogits, *, batch: int, scaled: Size
) -> Tensor:
    """run: pictures, and the sizes (h, w) in which the model is to see them -> logits (K, h, w) of each.
    scaled: of the whole picture, in which the tiles have their views.

    The class (H, W) of every pixel, uint8 for up to 256 classes, else int32, by the mean of the logits of all
    tiles that see it, which count the less the nearer it lies to their edge.
    """
    size = (image.height, image.width)
    cells, labels = _Cells([tile.view for tile in tiles]), None
    for first in range(0, len(tiles), batch):
        part = tiles[first : first + batch]
        for tile, logits in zip(part, run(*_cut(image, part)), strict=True):
            if labels is None:
                labels = torch.empty(size, dtype=label_dtype(len(logits)))
            for view, mean in cells.add(tile.view, logits):
                top, left, bottom, right = scaled_window(view, scaled, size)
                labels[top:bottom, left:right] = class_map(mean[None], (bottom - top, right - left))[0]
    assert labels is not None
    return labels


def _cut(image: Image, tiles: Sequence[Tile]) -> tuple[list[Image], list[Size]]:
    """Their pictures, and the sizes in which the model sees them."""
    crops = [image.crop((w.left, w.top, w.right, w.bottom)) for w in (tile.source for tile in tiles)]
    return crops, [tile.size for tile in tiles]


def _moved(found: Detections, tile: Window, size: Size) -> Detections:
    """In pixels of the picture, of `size`."""
    offset = found.boxes.new_tensor([tile.left, tile.top, tile.left, tile.top])
    masks = None if found.masks is None else found.masks.moved(tile.top, tile.left, size)
    return replace(found, boxes=found.boxes + offset, masks=masks, image_size=size)


class _Cells:
    """The picture cut at the edges of all tiles: each cell is seen by the same tiles all over, and its mean
    is known as soon as the last of them has come.
    """

    def __init__(self, views: Sequence[Window]) -> None:
        self.rows = sorted({edge for view in views for edge in (view.top, view.bottom)})
        self.cols = sorted({edge for view in views for edge in (view.left, view.right)})
        self.missing = Counter(cell for view in views for cell in self._of(view))
        self.sums: dict[Window, tuple[Tensor, Tensor]] = {}

    def _of(self, view: Window) -> list[Window]:
        rows = [edge for edge in self.rows if view.top <= edge <= view.bottom]
        cols = [edge for edge in self.cols if view.left <= edge <= view.right]
        return [
            Window(top, left, bottom, right)
            for (top, bottom), (left, right) in product(pairwise(rows), pairwise(cols))
        ]

    def add(self, view: Window, logits: Tensor) -> Iterator[tuple[Window, Tensor]]:
        """logits (K, h, w) of a tile -> the cells for which no tile is missing any more, with their mean."""
        weights = _weights(logits)
        for cell in self._of(view):
            rows = slice(cell.top - view.top, cell.bottom - view.top)
            cols = slice(cell.left - view.left, cell.right - view.left)
            weight = weights[rows, cols]
            values = logits[:, rows, cols].float() * weight
            if cell in self.sums:
                sums, total = self.sums.pop(cell)
                values, weight = values + sums, weight + total
            self.missing[cell] -= 1
            if self.missing[cell]:
                self.sums[cell] = values, weight
            else:
                yield cell, values / weight


def _weights(logits: Tensor) -> Tensor:
    """(h, w) of a tile's logits (K, h, w): 1 in the middle, less towards the edges, nowhere 0."""
    ramps = []
    for side in logits.shape[-2:]:
        places = torch.arange(side, device=logits.device) + 0.5
        ramps.append(torch.minimum(places, side - places) / (side / 2))
    return ramps[0][:, None] * ramps[1]
