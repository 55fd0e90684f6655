"""A map cut into crops and put together again, from two perspectives.

INF-LLaVA, arXiv 2407.16198, section 4.2 (equations 8 to 17): a local crop is a block of the map; a global one
is every n-th cell, so that it shows the whole. Letters: B batch, (R, K) the grid of crops, (h, w) the size of
a crop, C channels. Crops are numbered row by row.
"""

from __future__ import annotations

from torch import Tensor

from stepwell.structures import Size

__all__ = ["Phases", "merge_blocks", "merge_strides", "middle", "split_blocks", "split_strides"]

Phases = tuple[range, range]
"""Rows and columns of a grid of crops."""


def split_blocks(x: Tensor, grid: Size) -> Tensor:
    """(B, R*h, K*w, C) -> local crops (B, R*K, h, w, C). Raises ValueError for sides that do not divide."""
    rows, cols = _divided(x, grid)
    x = x.unflatten(2, (grid[1], cols)).unflatten(1, (grid[0], rows))  # (B, R, h, K, w, C)
    return x.transpose(2, 3).flatten(1, 2)


def merge_blocks(crops: Tensor, grid: Size) -> Tensor:
    """Undoes `split_blocks`."""
    x: Tensor = crops.unflatten(1, grid)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def split_strides(x: Tensor, grid: Size, phases: Phases | None = None) -> Tensor:
    """(B, R*h, K*w, C) -> global crops (B, R*K, h, w, C): crop (i, j) has the cells (i + y*R, j + x*K).

    phases: the i and j that are wanted, None for all. Raises ValueError for sides that do not divide.
    """
    rows, cols = _divided(x, grid)
    x = x.unflatten(2, (cols, grid[1])).unflatten(1, (rows, grid[0]))  # (B, h, R, w, K, C)
    if phases is not None:
        down, across = (slice(each.start, each.stop) for each in phases)
        x = x[:, :, down, :, across]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def merge_strides(crops: Tensor, grid: Size) -> Tensor:
    """Undoes `split_strides`."""
    x: Tensor = crops.unflatten(1, grid)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)


def middle(count: int) -> range:
    """The global crops, of `count` along an axis, that a map shrunk by `count` is made of, when it is
    resized bilinearly with corners not aligned and without antialiasing.

    Cell i of the small map samples the large one at `count * i + (count - 1) / 2`: a cell, that of one crop,
    where `count` is odd, and half-way between two where it is even.
    """
    return range((count - 1) // 2, count // 2 + 1)


def _divided(x: Tensor, grid: Size) -> Size:
    height, width = x.shape[1:3]
    if height % grid[0] or width % grid[1]:
        raise ValueError(
            f"{height}x{width} does not divide into {grid[0]}x{grid[1]} crops; resize it to a multiple first"
        )
    return height // grid[0], width // grid[1]
