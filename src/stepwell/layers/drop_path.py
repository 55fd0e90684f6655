"""Stochastic depth: a residual path is left out for some samples of a batch (arXiv 1603.09382)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

__all__ = ["DropPath", "DropPathSchedule", "drop_path_rates"]

DropPathSchedule = Literal["constant", "linear"]


class DropPath(nn.Module):
    """In training, zeroes a sample with probability `rate` and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depth: int, schedule: DropPathSchedule) -> list[float]:
    """One rate per layer: the same everywhere, or growing linearly from 0 to `rate`."""
    if schedule == "constant":
        return [rate] * depth
    if schedule == "linear":
        return [rate * i / max(depth - 1, 1) for i in range(depth)]
    raise ValueError(f"unknown drop path schedule {schedule!r}; choose 'constant' or 'linear'")
