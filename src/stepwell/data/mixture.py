"""Samples of several sources: all of them again and again, or drawn by weight, for training; or all of them
in order for validation.

A sample that cannot be used comes with the samples themselves, as a BadSample, so that whoever draws from
other processes learns of it, and learns the same again when a run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from stepwell.data.sample import BadSample, Prepare, Source, read

__all__ = ["PATIENCE", "Drawn", "InOrder", "Mixture"]


PATIENCE = 1000  # with bad samples in a row


class Drawn(NamedTuple):
    """A prepared sample, None where there is none that could be used; and the bad ones met on the way."""

    sample: Any
    bad: tuple[BadSample, ...] = ()


class InOrder:
    """All samples of several sources, one source after the other. A bad one is not replaced."""

    def __init__(self, sources: Sequence[Source], prepare: Prepare) -> None:
        self.sources, self.prepare = list(sources), prepare
        self.places = [(number, i) for number, source in enumerate(sources) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Drawn:
        sample = read(self.sources, *self.places[index], self.prepare)
        return Drawn(None, (sample,)) if isinstance(sample, BadSample) else Drawn(sample)


class Mixture:
    """`length` samples of several sources, drawn by weight; without weights each sample comes once before any
    comes again.

    Index i always leads to the same sample, with the same random numbers of torch while it is prepared. None
    of a source comes again before all of it have come, but for the good ones that replace bad ones: the next
    of their source, of which at most `patience` are looked at. even: in every so many samples, a batch, each
    source has its share, rounded up or down. Raises ValueError for weights that do not fit.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        *,
        length: int,
        prepare: Prepare,
        seed: int = 0,
        patience: int = PATIENCE,
        even: int | None = None,
    ) -> None:
        if not sources:
            raise ValueError("there is no source")
        if weights is not None and (len(sources) != len(weights) or min(weights) <= 0):
            raise ValueError(f"{len(sources)} sources need a positive weight each, got {list(weights)}")
        if empty := [number for number, source in enumerate(sources) if not len(source)]:
            raise ValueError(f"source {empty[0]} is empty")
        self.sources, self.length, self.seed = list(sources), length, seed
        self.prepare, self.patience = prepare, patience
        lengths = [len(source) for source in sources]
        shares = None if weights is None else np.asarray(weights, dtype=float) / sum(weights)
        self.epoch = sum(lengths) if shares is None else max(1, int((lengths / shares).min()))
        """So many samples in a row are of no source more than it holds; by weight, on average."""
        self._which = self._drawn(shares, even)
        self._turn = np.empty(length, dtype=np.int64)  # how many of its source have come before
        for number in range(len(sources)):
            of_this = self._which == number
            self._turn[of_this] = np.arange(of_this.sum())

    def _drawn(
        self, shares: np.ndarray[tuple[int], np.dtype[np.float64]] | None, even: int | None
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The number of the source of every sample."""
        chance = np.random.default_rng(self.seed)
        if shares is not None and even is not None:
            # Systematic sampling: points at equal distances along the shares, from a start by chance.
            starts, keys = np.split(chance.random((-(-self.length // even), 1 + even)), [1], axis=1)
            which = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(even) + starts) / even, side="right")
            return np.take_along_axis(which, keys.argsort(1), 1).ravel()[: self.length]
        if shares is not None:
            return chance.choice(len(self.sources), size=self.length, p=shares)
        lengths = [len(source) for source in self.sources]
        each = np.repeat(np.arange(len(lengths)), lengths)
        epochs = [chance.permutation(each) for _ in range(-(-self.length // len(each)))]
        return np.concatenate([each[:0], *epochs])[: self.length]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Drawn:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        number, turn = int(self._which[index]), int(self._turn[index])
        length = len(self.sources[number])
        epoch, first = divmod(turn, length)
        order = _shuffled(length, self.seed, number, epoch)
        bad: list[BadSample] = []
        for step in range(min(length, self.patience)):
            place = int(order[(first + step) % length])
            with _chances_of(self.seed, index):
                sample = read(self.sources, number, place, self.prepare)
            if not isinstance(sample, BadSample):
                return Drawn(sample, tuple(bad))
            bad.append(sample)
        return Drawn(None, tuple(bad))

    def places(self) -> list[tuple[int, int]]:
        """Of every index, the number of the source and the index there that it leads to, unless what is there
        is bad. Nothing is read.
        """
        places = np.empty(self.length, dtype=np.int64)
        for number, source in enumerate(self.sources):
            of_this = self._which == number
            turns = (divmod(turn, len(source)) for turn in self._turn[of_this].tolist())
            places[of_this] = [
                _shuffled(len(source), self.seed, number, epoch)[first] for epoch, first in turns
            ]
        return list(zip(self._which.tolist(), places.tolist(), strict=True))


@contextmanager
def _chances_of(*seed: int) -> Iterator[None]:
    """torch's random numbers on the CPU are those of a seed; afterwards they go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        yield


@lru_cache(maxsize=16)
def _shuffled(length: int, *seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng(seed).permutation(length)
