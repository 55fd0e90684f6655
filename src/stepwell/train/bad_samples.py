"""The samples of a stage that could not be used: counted, named in a file, and refused where that was asked.

They come with the batches (data/mixture.py), so that workers and processes are counted alike, and a stage
that goes on behind a checkpoint counts on.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from stepwell.data.sample import FAULT, BadSample, Source
from stepwell.language.characters import well_formed

__all__ = ["FILE", "BadSamples"]

FILE = "bad_samples.csv"
_HEADER = ("step", "source", "place", "where", "reason")
_TOLD = 10  # lines in the log; the file holds all
_logger = logging.getLogger(__name__)


class BadSamples(TrainerCallback):
    """Of one stage. refuse: the first ends the run. limit: percent of the samples of a source, of which more
    end it; None is no limit. Sources are numbered in their order, and a sample counts once.
    """

    def __init__(
        self, folder: Path, sources: Sequence[Source], *, refuse: bool = False, limit: float | None = None
    ) -> None:
        self.path = folder / FILE
        self.sizes = [len(source) for source in sources]
        self.refuse, self.limit = refuse, limit
        self.steps: dict[BadSample, int] = {}  # -> the step at which it was met first
        self.counts: Counter[int] = Counter()  # by source
        self.faults = [
            BadSample(number, FAULT, well_formed(where), well_formed(reason))
            for number, source in enumerate(sources)
            for where, reason in getattr(source, "faults", ())
        ]
        self._known: set[Any] = set()
        self._writes, self._written, self._shared = False, 0, 0

    def add(self, bad: Iterable[BadSample], *, step: int) -> None:
        """What this process met while it drew the batches of a step. Raises ValueError as the recipe says."""
        for sample in bad:
            if _key(sample) not in self._known:
                self._count(sample, step)
                self._refuse(sample)
                self._tell(sample)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up what an earlier run met up to the checkpoint."""
        self._writes = state.is_world_process_zero
        if state.global_step and self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                for step, source, place, where, reason in list(csv.reader(file))[1:]:
                    if int(step) <= state.global_step:
                        self._count(BadSample(int(source), int(place), where, reason), int(step))
            self._written = -1  # what was met behind the checkpoint has to go
            for sample in self.steps:  # the rule may be another than it was
                self._refuse(sample)
        self.add(self.faults, step=0)
        self.write()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Tells every process what the others met, and the log how many there are."""
        self._share()
        if self.steps and logs is not None:
            logs["bad_samples"] = len(self.steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._share()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._share()
        if self.steps and self._writes:
            _logger.warning("%d bad samples were left out: %s", len(self.steps), self.path)

    def _share(self) -> None:
        if torch.distributed.is_initialized():
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, dict([*self.steps.items()][self._shared :]))
            for steps in everywhere:
                for sample, step in steps.items():
                    self.add([sample], step=step)
            self._shared = len(self.steps)
        self.write()

    def _count(self, sample: BadSample, step: int) -> None:
        self._known.add(_key(sample))
        self.steps[sample] = step
        self.counts[sample.source] += sample.place != FAULT

    def _refuse(self, sample: BadSample) -> None:
        complaint = f"{sample.where}: {sample.reason}"
        count, size = self.counts[sample.source], self.sizes[sample.source]
        if self.refuse:
            self.write()
            raise ValueError(f"{complaint}; mend it, take it out, or say bad_samples: skip")
        if self.limit is not None and count > size * self.limit / 100:
            self.write()
            raise ValueError(
                f"{count} of {size} samples of a source are bad, more than bad_samples_limit "
                f"({self.limit:g} %) allows; the last, {complaint}"
            )

    def _tell(self, sample: BadSample) -> None:
        if len(self.steps) <= _TOLD:
            _logger.warning("a bad sample is left out, %s: %s", sample.where, sample.reason)
        elif len(self.steps) == _TOLD + 1:
            _logger.warning("more bad samples are left out; %s has them all", self.path)

    def write(self) -> None:
        """The table of all that were met, if there are new ones."""
        if not self._writes or len(self.steps) == self._written:
            return
        part = self.path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            rows = sorted((step, *sample) for sample, step in self.steps.items())
            csv.writer(file).writerows([_HEADER, *rows])
        part.replace(self.path)
        self._written = len(self.steps)


def _key(sample: BadSample) -> Any:
    """By which it is known again, whatever the reason was at another time."""
    return sample[:2] if sample.place != FAULT else sample[:3]
