"""Scores of segmenters, of one matrix over a whole set: which class pixels have, and which they are given.

IoU of a class: pixels that are rightly given it, over those that have it or are given it. Letters: K classes
of the data, K' = K, or K + 1 where a model may give pixels a class that the data lack, (H, W) the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepwell.evaluate.scoring import percentile_interval, resampled

__all__ = ["ClassPixels", "SegmentationResult", "SegmentationScores", "confusion_of_pixels"]

Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class ClassPixels:
    """Of one class. pixels: that have it. iou: None where no pixel has it or is given it; accuracy: the share
    of its pixels that are rightly given it, None where there are none.
    """

    pixels: int
    iou: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """0 to 1, None where there is nothing to average. interval: of 95 %, of the mean IoU, over resamples of
    the images; None for a single one. confusion: (K, K'), rows are what pixels are.
    """

    images: int
    mean_iou: float | None
    interval: tuple[float, float] | None
    mean_accuracy: float | None
    pixel_accuracy: float | None
    classes: dict[str, ClassPixels]
    confusion: Counts


class SegmentationScores:
    """Collects the matrices of images. classes: names, in the order of labels. has_others: the last column of
    the matrix is of pixels that are given a class that the data lack.
    """

    def __init__(self, classes: Sequence[str], *, has_others: bool = False, ignored: int = 255) -> None:
        self.classes, self.ignored = tuple(classes), ignored
        self._shape = len(self.classes), len(self.classes) + has_others
        self._sum: Counts = np.zeros(self._shape, np.int64)
        self._totals: list[Floats] = []  # of every image (K, 3): rightly given, had, given

    def add(self, truth: Tensor, found: Tensor) -> None:
        """Labels (H, W) of an image, on any device. Raises ValueError as `confusion_of_pixels`."""
        self.add_matrix(confusion_of_pixels(truth, found, self._shape, ignored=self.ignored).cpu().numpy())

    def add_matrix(self, matrix: Counts) -> None:
        """(K, K') of an image. Raises ValueError for another shape."""
        if matrix.shape != self._shape:
            raise ValueError(f"the matrix of an image is {self._shape}, got {matrix.shape}")
        self._sum += matrix
        self._totals.append(_totals(matrix))

    def result(self) -> SegmentationResult:
        totals = _totals(self._sum)
        right, had, _ = totals.T
        ious, accuracies = _ious(totals), _ratio(right, had)
        interval = None
        if len(self._totals) > 1:
            means = _mean_of_told(_ious(resampled(np.stack(self._totals))))
            told = means[~np.isnan(means)]  # a resample may hold only images in which nothing counts
            interval = percentile_interval(told) if len(told) else None
        mean_iou, mean_accuracy = _mean_of_told(ious), _mean_of_told(accuracies)
        return SegmentationResult(
            images=len(self._totals),
            mean_iou=_told(mean_iou),
            interval=interval,
            mean_accuracy=_told(mean_accuracy),
            pixel_accuracy=float(right.sum() / had.sum()) if had.any() else None,
            classes={
                name: ClassPixels(pixels=int(had[k]), iou=_told(ious[k]), accuracy=_told(accuracies[k]))
                for k, name in enumerate(self.classes)
            },
            confusion=self._sum.copy(),
        )


def confusion_of_pixels(
    truth: Tensor, found: Tensor, shape: tuple[int, int], *, ignored: int = 255
) -> Tensor:
    """Labels (H, W), both on one device -> how many pixels have a label (rows) and are given one (columns),
    (K, K') = shape, int64. Pixels whose true label is `ignored` count nowhere. Raises ValueError for maps of
    unequal sizes, and for labels that there are not.
    """
    if truth.shape != found.shape:
        raise ValueError(f"maps of labels are of one size, got {tuple(truth.shape)} and {tuple(found.shape)}")
    counted = truth != ignored
    true, given = truth[counted].long(), found[counted].long()
    for name, labels, count in (("true", true, shape[0]), ("found", given, shape[1])):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ValueError(
                f"{name} labels are 0 to {count - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
    return torch.bincount(true * shape[1] + given, minlength=shape[0] * shape[1]).view(shape)


def _totals(matrix: Counts) -> Floats:
    """(K, K') -> (K, 3): pixels rightly given a class, that have it, that are given it."""
    count = len(matrix)
    return np.stack([np.diagonal(matrix), matrix.sum(1), matrix.sum(0)[:count]], 1).astype(np.float64)


def _ious(totals: Floats) -> Floats:
    """(..., K, 3) -> (..., K), NaN for a class that no pixel has or is given."""
    right, had, given = np.moveaxis(totals, -1, 0)
    return _ratio(right, had + given - right)


def _ratio(part: Floats, whole: Floats) -> Floats:
    ratio: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio


def _mean_of_told(values: Floats) -> Floats:
    """Over the last axis, NaN left out."""
    is_told = ~np.isnan(values)
    mean: Floats = _ratio(np.where(is_told, values, 0.0).sum(-1), np.asarray(is_told.sum(-1), np.float64))
    return mean


def _told(value: Floats | float) -> float | None:
    return None if np.isnan(value) else float(value)
