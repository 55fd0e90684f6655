"""The Encoder protocol: a stem, layers that can be run a few at a time, and the way back to a map.

Branches of a pyramid meet in between layers (PIIP, arXiv 2501.07783, section III-B), so an encoder here is
not a closed function: `stem`, then `run` over closed ranges of layers, then `to_map`.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from stepwell.structures import EncoderSpec, TokenMap

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Encoder",
    "Statistics",
    "drop_path_rates",
]

Statistics = tuple[float, float, float]
"""Of red, green and blue, for pixels in [0, 1]."""

IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)


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
