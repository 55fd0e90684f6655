"""The Encoder protocol: a stem, layers that can be run a few at a time, and the way back to a map.

Branches of a pyramid meet in between layers (PIIP, arXiv 2501.07783, section III-B), so an encoder here is
not a closed function: `stem`, then `run` over closed ranges of layers, then `to_map`.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from stepwell.structures import EncoderSpec, TokenMap

__all__ = ["Encoder", "drop_path_rates"]


@runtime_checkable
class Encoder(Protocol):
    spec: EncoderSpec

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, H, W) normalised -> tokens after patch or stem embedding, positions added."""
        ...

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Layers first..last, both included; an empty range (last < first) returns `state` unchanged."""
        ...

    def to_map(self, state: TokenMap) -> Tensor:
        """-> (B, C, H, W) of the patch tokens, without the class token."""
        ...


def drop_path_rates(rate: float, depth: int, schedule: Literal["constant", "linear"]) -> list[float]:
    """One rate per layer: the same everywhere, or growing linearly from 0 to `rate`."""
    if schedule == "constant":
        return [rate] * depth
    if schedule == "linear":
        return [rate * i / max(depth - 1, 1) for i in range(depth)]
    raise ValueError(f"unknown drop path schedule {schedule!r}; choose 'constant' or 'linear'")
