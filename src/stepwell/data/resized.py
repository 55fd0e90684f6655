"""A source whose images are resized before anything looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.data.sample import Sample, Source
from stepwell.structures import Size

__all__ = ["Resized"]


class Resized:
    """`share` of a source's samples with a `resize`, the others as they are; also those that have one.

    Which ones depends on the seed and their index alone, so that a resumed run meets the same, as does every
    epoch. seed: numbers, one of them the source's own, or the same places of all sources are drawn. within:
    only samples with an image whose path has this in it, in capitals or not.
    """

    def __init__(
        self,
        source: Source,
        resize: Callable[[Size], Size],
        *,
        share: float = 1.0,
        seed: tuple[int, ...] = (0,),
        within: str = "",
    ) -> None:
        self.source, self.resize, self.share = source, resize, share
        self.seed, self.within = seed, within.lower()

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return self.source.where(index)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.source[index]
        if sample.resize is not None or not self._is_meant(sample):
            return sample
        if np.random.default_rng((*self.seed, index)).random() >= self.share:
            return sample
        return replace(sample, resize=self.resize)

    def _is_meant(self, sample: Sample) -> bool:
        return not self.within or any(self.within in _path(image) for image in sample.images)


def _path(image: Any) -> str:
    """Of an image that is told by one, in small letters."""
    return str(image).lower() if isinstance(image, str | Path) else ""
