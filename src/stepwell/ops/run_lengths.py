"""Masks as run lengths: COCO's, column by column, as plain counts and as its compressed text.

Lin et al., arXiv 1405.0312; the text is that of `mask.py` of the COCO API. Letters: (H, W) the picture,
(h, w) a part of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwell.ops.sliding_windows import Window
from stepwell.structures import Size

__all__ = ["Mask", "compressed", "label_runs", "mask_runs"]

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


def mask_runs(mask: Mask, window: Window, size: Size) -> Numbers:
    """A mask (h, w) of the part `window` of a picture of `size` -> lengths of its runs in the whole picture,
    by turns outside and inside of it, outside first. The picture's own mask is never made.
    """
    height, width = mask.shape
    edges = np.zeros((width, height + 2), np.int8)
    edges[:, 1:-1] = mask.T
    changes = np.diff(edges, axis=1)
    offset = (np.arange(width) + window.left)[:, None] * size[0] + window.top + np.arange(height + 1)
    return _counts(offset[changes > 0], offset[changes < 0], size)


def label_runs(labels: np.ndarray[Any, Any], classes: int) -> list[Numbers]:
    """A map of labels (H, W) -> of each class from 0 on the run lengths of its mask."""
    size = (labels.shape[0], labels.shape[1])
    column_by_column = labels.T.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(column_by_column)) + 1])
    ends = np.append(starts[1:], labels.size)
    of_run = column_by_column[starts]
    return [_counts(starts[of_run == label], ends[of_run == label], size) for label in range(classes)]


def _counts(starts: Numbers, ends: Numbers, size: Size) -> Numbers:
    """Runs from a start to before an end, in order -> counts. Runs that touch become one."""
    apart = starts[1:] != ends[:-1]
    edges = np.zeros(2 * np.count_nonzero(apart) + 2 * bool(len(starts)) + 2, np.int64)
    if len(starts):
        edges[1:-1:2] = starts[np.append(True, apart)]
        edges[2:-1:2] = ends[np.append(apart, True)]
    edges[-1] = size[0] * size[1]
    counts = np.diff(edges)
    return counts if counts[-1] else counts[:-1]


def compressed(counts: Numbers) -> str:
    """Counts -> text: five bits a character, low ones first; from the fourth on, the difference to the count
    before the last.
    """
    values = counts.copy()
    values[3:] -= counts[1:-2]
    text = bytearray()
    for value in values.tolist():
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            text.append(48 + (bits if done else bits | 32))
            if done:
                break
    return text.decode("ascii")
