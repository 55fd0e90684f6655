"""Tokens, maps and windows: each split with its merge.

Letters: B batch, C width, (H, W) a grid in cells, w the side of a window. Tokens are row-major.
"""

from __future__ import annotations

from torch import Tensor

from stepwell.structures import Size

__all__ = ["map_to_tokens", "merge_windows", "split_windows", "tokens_to_map"]


def tokens_to_map(tokens: Tensor, size: Size) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), size = (H, W)."""
    x: Tensor = tokens.transpose(1, 2).unflatten(2, size)
    return x


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def split_windows(tokens: Tensor, size: Size, window: int, *, padding: Tensor | None = None) -> Tensor:
    """(B, H*W, C) -> (B*n, w*w, C): windows from the top left.

    Cells that a ragged grid lacks at its right and bottom hold `padding` (C,), by default zeros.
    """
    (height, width), (rows, cols) = size, _num_windows(size, window)
    x: Tensor = tokens.unflatten(1, size)
    if (rows * window, cols * window) != size:
        padding = tokens.new_zeros(tokens.shape[-1]) if padding is None else padding
        padded = padding.expand(len(tokens), rows * window, cols * window, -1).clone()
        padded[:, :height, :width] = x
        x = padded
    x = x.unflatten(2, (cols, window)).unflatten(1, (rows, window))  # (B, rows, w, cols, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge_windows(windows: Tensor, size: Size, window: int) -> Tensor:
    """(B*n, w*w, C) -> (B, H*W, C): undoes `split_windows`, dropping what it had padded."""
    (height, width), (rows, cols) = size, _num_windows(size, window)
    x: Tensor = windows.unflatten(1, (window, window)).unflatten(0, (-1, rows, cols))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows*w, cols*w, C)
    return x[:, :height, :width].flatten(1, 2)


def _num_windows(size: Size, window: int) -> Size:
    return -(-size[0] // window), -(-size[1] // window)
