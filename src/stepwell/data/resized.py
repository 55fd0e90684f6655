"""A source whose images are resized before anything looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stepwell.data.sample import Sample, Source
from stepwell.structures import Size

__all__ = ["Resized"]


class Resized:
    """`share` of a source's samples with a `resize`, the others as they are.

    Which ones depends on the seed and their index alone, so that a resumed run meets the same.
    """

    def __init__(
        self, source: Source, resize: Callable[[Size], Size], *, share: float = 1.0, seed: int = 0
    ) -> None:
        self.source, self.resize, self.share, self.seed = source, resize, share, seed

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return self.source.where(index)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.source[index]
        if np.random.default_rng((self.seed, index)).random() >= self.share:
            return sample
        return replace(sample, resize=self.resize)
