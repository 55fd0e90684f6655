"""Maps of a backbone -> maps of one width, and coarser ones where more are wanted.

The neck of Deformable DETR (arXiv 2010.04159, appendix A.2) and of DINO (arXiv 2203.03605), as in PIIP's
detectors. Letters: B batch, C width of a map that comes in, D of those that leave, (h, w) a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stepwell.layers.conv import Conv2d
from stepwell.layers.projection import Projection
from stepwell.ops.double import AnyMap, finished

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """A 1x1 convolution and a GroupNorm for every map, and coarser maps behind until there are `num_levels`.

    A coarser map is made by a 3x3 convolution of stride 2 and a GroupNorm: the first from the last map that
    comes in, every other from the one before it. dims: width of every map that comes in.
    """

    def __init__(self, dims: Sequence[int], dim: int, *, num_levels: int, num_groups: int = 32) -> None:
        super().__init__()
        if not 1 <= len(dims) <= num_levels:
            raise ValueError(f"{len(dims)} maps do not make {num_levels} levels; give 1 to {num_levels} maps")
        if dim % num_groups:
            raise ValueError(f"width {dim} does not divide into {num_groups} groups")

        def level(conv: nn.Conv2d) -> nn.Sequential:
            return nn.Sequential(conv, nn.GroupNorm(num_groups, dim))

        extra_dims = [dims[-1], *[dim] * num_levels][: num_levels - len(dims)]
        self.projections = nn.ModuleList(level(Projection(in_dim, dim, bias=False)) for in_dim in dims)
        self.extras = nn.ModuleList(
            level(Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)) for in_dim in extra_dims
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[AnyMap]) -> list[Tensor]:
        """(B, C, h, w) each, finest first -> (B, D, h, w) each, `num_levels` of them."""
        mapped = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        coarsest = finished(maps[-1])
        for extra in self.extras:
            coarsest = extra(coarsest)
            mapped.append(coarsest)
        return mapped
