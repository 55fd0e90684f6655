"""Several sources as one, in fixed proportions, without the samples that these cannot give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from stepwell.data.sample import Sample, Source

__all__ = ["Mixture"]

_logger = logging.getLogger(__name__)
_ATTEMPTS = 20


class Mixture:
    """A source of `length` samples drawn from others by weight.

    Index i always leads to the same sample, and none of a source comes again before all of it have come. One
    for which its source raises OSError, ValueError or KeyError is replaced by another of that source, counted
    in `skipped` (by each process for itself) and logged; an image that is still a path is not opened here.
    Raises ValueError for weights that do not fit, RuntimeError after 20 such samples in a row.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], *, length: int, seed: int = 0
    ) -> None:
        if len(sources) != len(weights) or not sources or min(weights) <= 0:
            raise ValueError(f"{len(sources)} sources need a positive weight each, got {list(weights)}")
        if empty := [number for number, source in enumerate(sources) if not len(source)]:
            raise ValueError(f"source {empty[0]} is empty")
        self.sources, self.weights, self.length, self.seed = list(sources), list(weights), length, seed
        self.skipped = 0
        shares = np.asarray(weights, dtype=float) / sum(weights)
        self._which = np.random.default_rng(seed).choice(len(sources), size=length, p=shares)
        self._turn = np.empty(length, dtype=np.int64)  # how many of its source have come before
        for number in range(len(sources)):
            of_this = self._which == number
            self._turn[of_this] = np.arange(of_this.sum())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        number, turn = int(self._which[index]), int(self._turn[index])
        source = self.sources[number]
        for attempt in range(_ATTEMPTS):
            epoch, place = divmod(turn + attempt, len(source))
            place = int(_shuffled(len(source), self.seed, number, epoch)[place])
            try:
                sample: Sample = source[place]
                return sample
            except (OSError, ValueError, KeyError) as error:
                self.skipped += 1
                _logger.warning("sample %d skipped (%d so far): %s", place, self.skipped, error)
        raise RuntimeError(f"{_ATTEMPTS} samples in a row could not be read; is the path of the data right?")


@lru_cache(maxsize=16)
def _shuffled(length: int, *seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng(seed).permutation(length)
