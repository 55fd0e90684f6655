"""Schedules of learning rates that transformers has not: those of MMDetection, MMSegmentation and DeiT, step
by step as their code sets them. Counts are of the optimiser's steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["SCHEDULES", "EpochCosine", "Line", "Run", "Steps", "build_schedule", "checked_arguments"]

_SETTINGS = ConfigDict(extra="forbid")
_Rate = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Steps:
    """The rate is multiplied by gamma at every milestone, in epochs where the stage counts these, else in
    steps; before, it rises in a line from warmup_ratio of it.
    """

    milestones: tuple[_Rate, ...]
    gamma: _Rate = 0.1
    warmup_ratio: _Rate = 0.001

    def rate(self, step: int, lr: float, run: Run) -> float:
        """At a step, of the full rate `lr`."""
        passed = sum(run.in_steps(place) <= step for place in self.milestones)
        return lr * self.gamma**passed * _warmed(step, run.warmup, self.warmup_ratio)


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Line:
    """In a line to 0 at the end of the stage, from the full rate at its first step; the steps of the warm-up
    have a part of that, which rises from warmup_ratio.
    """

    warmup_ratio: _Rate = 1e-6

    def rate(self, step: int, lr: float, run: Run) -> float:
        """At a step, of the full rate `lr`."""
        return lr * (1 - step / run.steps) * _warmed(step, run.warmup, self.warmup_ratio)


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class EpochCosine:
    """One rate an epoch: a line from `start` over warmup_epochs, then a cosine to `floor`, the same for all
    parts. lag: the rate of an epoch is that of the one before it, as DeiT's code sets it behind each.
    """

    start: _Rate = 1e-6
    floor: _Rate = 1e-5
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    lag: bool = True

    def rate(self, step: int, lr: float, run: Run) -> float:
        """At a step, of the full rate `lr`."""
        epoch = max(int(step / run.epoch_steps) - self.lag, 0)
        if epoch < self.warmup_epochs:
            return self.start + epoch * (lr - self.start) / self.warmup_epochs
        epochs = run.steps / run.epoch_steps
        return self.floor + (lr - self.floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """Steps of a stage, of an epoch, and of the warm-up. in_epochs: whether the stage counts epochs."""

    steps: int
    epoch_steps: float
    warmup: int
    in_epochs: bool

    def in_steps(self, place: float) -> float:
        """A place that is told as the stage counts."""
        return place * self.epoch_steps if self.in_epochs else place


SCHEDULES: Mapping[str, type[Steps | Line | EpochCosine]] = {
    "step": Steps,
    "line": Line,
    "epoch_cosine": EpochCosine,
}
"""By the name that a recipe gives; their arguments are the fields."""


def checked_arguments(name: str, arguments: Mapping[str, Any]) -> Steps | Line | EpochCosine:
    """Raises pydantic's ValidationError, a ValueError, for arguments that a schedule of ours has not."""
    return TypeAdapter(SCHEDULES[name]).validate_python(dict(arguments))


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: Steps | Line | EpochCosine, run: Run
) -> LambdaLR:
    """Of every group of the optimiser, from its own rate."""
    rates: Sequence[float] = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def factor(lr: float) -> Callable[[int], float]:
        return lambda step: schedule.rate(step, lr, run) / lr

    return LambdaLR(optimizer, [factor(lr) for lr in rates])


def _warmed(step: int, warmup: int, ratio: float) -> float:
    return 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)
