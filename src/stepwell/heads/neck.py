"""From one stride to four: the small pyramid behind a plain vision transformer.

ViTDet, arXiv 2203.16527, section 3 (simple feature pyramid); PIIP, arXiv 2501.07783, puts detectors on it.
Letters: B batch, C width, (H, W) the grid of the map that comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from stepwell.layers.linear import is_plain
from stepwell.ops.double import AnyMap, Doubled, double_map

__all__ = ["FACTORS", "SIMPLE", "NeckNorm", "Resampling", "SimplePyramid"]

Resampling = Literal["up4", "up2", "same", "maxpool2"]
FACTORS: dict[Resampling, float] = {"up4": 4, "up2": 2, "same": 1, "maxpool2": 0.5}
"""Size of the map that leaves by the size of the one that comes in; "maxpool2" rounds an odd side down."""
SIMPLE: tuple[Resampling, ...] = ("up4", "up2", "same", "maxpool2")
NeckNorm = Literal["groupnorm", "layernorm"]
"""Between the two steps of "up4": GroupNorm as in PIIP, or a LayerNorm over channels as in ViTDet."""


class SimplePyramid(nn.Module):
    """Maps of one stride, each resampled its own way: by default one map to 4x, 2x, 1x and half its size.

    dims: width of every map that comes in, one per operation; widths are kept.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        operations: Sequence[Resampling] = SIMPLE,
        norm: NeckNorm = "groupnorm",
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.operations = tuple(operations)
        self.stages = nn.ModuleList(
            _resampling(operation, dim, norm, num_groups)
            for operation, dim in zip(operations, dims, strict=True)
        )

    def forward(self, maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """(B, C, H, W), or one such map per operation -> one map per operation."""
        maps = [maps] * len(self.stages) if isinstance(maps, Tensor) else maps
        return [stage(x) for stage, x in zip(self.stages, maps, strict=True)]

    def unfinished(self, stage: int, x: Tensor) -> AnyMap:
        """What operation `stage` makes of (B, C, H, W), all but the doubling that it may end with."""
        layers = self.stages[stage]
        *before, last = [*layers.children()] or [layers]
        if not (is_plain(last, _Double) and is_plain(layers, nn.Sequential)):
            out: Tensor = layers(x)
            return out
        for layer in before:
            x = layer(x)
        assert isinstance(last, _Double)
        assert last.bias is not None
        return Doubled(x, last.weight, last.bias)


def _resampling(operation: Resampling, dim: int, norm: NeckNorm, num_groups: int) -> nn.Module:
    if operation == "up4":
        between = nn.GroupNorm(num_groups, dim) if norm == "groupnorm" else _ChannelLayerNorm(dim, eps=1e-6)
        return nn.Sequential(_Double(dim), between, nn.GELU(), _Double(dim))
    if operation == "up2":
        return nn.Sequential(_Double(dim))
    if operation == "same":
        return nn.Identity()
    if operation == "maxpool2":
        return nn.MaxPool2d(2)
    raise ValueError(f"unknown operation {operation!r}; choose from {sorted(FACTORS)}")


class _ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Double(nn.ConvTranspose2d):
    """The transposed convolution of a 2x2 kernel at stride 2, as one matrix product where that is faster."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2*H, 2*W)."""
        assert self.bias is not None
        return double_map(x, self.weight, self.bias)
