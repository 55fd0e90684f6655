"""For a point of the picture: what the cells of a vision transformer take of each other there.

PIIP, arXiv 2501.07783, figure 9, draws it for the branches of a pyramid. Queries and keys are those that the
network itself computes, with whatever other branches have told it by then. Letters: h heads, (H, W) the grid
of a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from stepwell.encoders.timm_encoder import TimmBlocks
from stepwell.encoders.vit import VisionTransformer
from stepwell.look.attention_rows import Attended, SeeAttention
from stepwell.look.subject import Point, Subject, holds
from stepwell.ops.choose import prefer
from stepwell.structures import Size, View

__all__ = ["EncoderRow", "cell_at", "encoder_rows"]


class EncoderRow(NamedTuple):
    """Of one view."""

    view: View
    layer: int  # of its encoder, counted from 0
    cell: tuple[int, int]  # row and column that hold the point
    row: Tensor  # (h, H, W); sums to 1, less what tokens without a place and padded cells take


def cell_at(view: View, point: Point, grid: Size) -> tuple[int, int]:
    """Row and column of the cell that shows a point of the picture."""
    left, top, right, bottom = view.box
    row = int((point[1] - top) / (bottom - top) * grid[0])
    col = int((point[0] - left) / (right - left) * grid[1])
    return min(row, grid[0] - 1), min(col, grid[1] - 1)


def encoder_rows(subject: Subject, point: Point, *, layer: int | None = None) -> list[EncoderRow]:
    """Of every view of a vision transformer that shows the point. layer: of each of them, None is the last
    that runs. Nothing where no encoder is one. Raises ValueError for a layer that does not run.
    """
    found: dict[int, EncoderRow] = {}
    running: list[_Reader] = []
    readers: list[_Reader] = []
    with ExitStack() as hooks:
        for encoder, views in zip(subject.encoders, subject.order, strict=True):
            for number, block in enumerate(_blocks(encoder)):
                if layer in (None, number):
                    readers.append(_Reader(subject, encoder, views, point, number, found))
                    hooks.enter_context(_noted(block, readers[-1], running))
        if any(_blocks(encoder) for encoder in subject.encoders) or layer is not None:
            with prefer("auto"), SeeAttention(lambda call: running[-1].see(call) if running else None):
                subject.look()
    if layer is not None and not any(reader.count for reader in readers):
        raise ValueError(f"layer {layer} is none that a vision transformer of {subject.name} runs")
    return [found[view] for view in sorted(found)]


def _blocks(encoder: Any) -> Sequence[nn.Module]:
    """Of a vision transformer."""
    if isinstance(encoder, VisionTransformer):
        return list(encoder.blocks)
    if isinstance(encoder, TimmBlocks):
        network: Any = encoder.network
        return list(network.blocks)
    return []


@contextmanager
def _noted(block: nn.Module, reader: _Reader, running: list[_Reader]) -> Iterator[None]:
    """Meanwhile `running` ends in the reader for as long as the block runs."""
    handles = (
        block.register_forward_pre_hook(lambda *_: running.append(reader)),
        block.register_forward_hook(lambda *_: running.pop() and None),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reader:
    """Reads the row of a point out of the attention of one layer, view after view."""

    def __init__(
        self,
        subject: Subject,
        encoder: Any,
        views: Sequence[int],
        point: Point,
        layer: int,
        found: dict[int, EncoderRow],
    ) -> None:
        self.subject, self.views, self.point, self.layer, self.found = subject, views, point, layer, found
        self.patch: int = encoder.spec.stride
        self.window: int = encoder.windows[layer] if isinstance(encoder, VisionTransformer) else 0
        self.count = 0  # views that went through

    def see(self, call: Attended) -> None:
        height, width = self.subject.tensors[self.views[self.count]].shape[-2:]
        grid = height // self.patch, width // self.patch
        windows = [-(-side // self.window) for side in grid] if self.window else [1, 1]
        batch = len(call.query) // (windows[0] * windows[1])
        for i, number in enumerate(self.views[self.count : self.count + batch]):
            view = self.subject.views[number]
            if holds(view, self.point):
                cell = cell_at(view, self.point, grid)
                row = self._windowed(call, i, cell, grid) if self.window else _global(call, i, cell, grid)
                self.found[number] = EncoderRow(view, self.layer, cell, row.cpu())
        self.count += batch

    def _windowed(self, call: Attended, i: int, cell: tuple[int, int], grid: Size) -> Tensor:
        side = self.window
        rows, cols = (-(-length // side) for length in grid)
        row, col = cell[0] // side, cell[1] // side
        taken = _one(call, (i * rows + row) * cols + col, cell[0] % side * side + cell[1] % side)
        whole = taken.new_zeros(len(taken), rows * side, cols * side)
        place = slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)
        whole[:, place[0], place[1]] = taken.unflatten(1, (side, side))
        return whole[:, : grid[0], : grid[1]]


def _global(call: Attended, i: int, cell: tuple[int, int], grid: Size) -> Tensor:
    in_front = call.query.shape[2] - grid[0] * grid[1]  # class token and registers
    taken = _one(call, i, in_front + cell[0] * grid[1] + cell[1])
    patches: Tensor = taken[:, in_front:].unflatten(1, grid)
    return patches


def _one(call: Attended, part: int, position: int) -> Tensor:
    """The row of one query of one part of a batch, (h, M)."""
    mask = call.mask
    if mask is not None and mask.ndim == 4 and len(mask) > 1:
        mask = mask[part : part + 1]
    alone = call._replace(query=call.query[part : part + 1], key=call.key[part : part + 1], mask=mask)
    return alone.rows([position])[0, :, 0]
