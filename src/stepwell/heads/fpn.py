"""Maps of one width from maps of many, each with what the coarser ones know.

Lin et al., arXiv 1612.03144, section 3.
Letters: B batch, C widths that come in, D the width that leaves, (h, w) a map's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.layers.conv import Conv2d
from stepwell.layers.projection import Projection
from stepwell.ops.double import AnyMap

__all__ = ["FeaturePyramid", "pyramid_strides"]


def pyramid_strides(strides: Sequence[float], num_extra: int) -> tuple[float, ...]:
    """Strides of the maps that leave, for those of the maps that come in."""
    return (*strides, *(strides[-1] * 2 ** (k + 1) for k in range(num_extra)))


class FeaturePyramid(nn.Module):
    """dims: widths of the maps, finest first. num_extra: maps behind the coarsest, each with every second
    cell of the one before.
    """

    def __init__(self, dims: Sequence[int], dim: int = 256, *, num_extra: int = 1) -> None:
        super().__init__()
        self.num_extra = num_extra
        self.lateral = nn.ModuleList(Projection(width, dim) for width in dims)
        self.output = nn.ModuleList(Conv2d(dim, dim, 3, padding=1) for _ in dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[AnyMap]) -> list[Tensor]:
        """(B, C, h, w), finest first -> (B, D, h, w), and the extra ones."""
        dtype = next(self.parameters()).dtype
        merged = [conv(x.to(dtype)) for conv, x in zip(self.lateral, maps, strict=True)]
        for fine in reversed(range(len(merged) - 1)):
            above = F.interpolate(merged[fine + 1], merged[fine].shape[-2:], mode="nearest")
            merged[fine] = merged[fine] + above
        out = [conv(x) for conv, x in zip(self.output, merged, strict=True)]
        for _ in range(self.num_extra):
            out.append(out[-1][..., ::2, ::2])
        return out
