"""Maps of a backbone -> maps of one width, and coarser ones behind them: the neck of DINO.

Deformable DETR, arXiv 2010.04159, appendix A.2, whose neck DINO and PIIP (arXiv 2501.07783) keep.
Letters: B batch, C width of a map, D the common width, (h, w) a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """A 1x1 convolution and GroupNorm for every map; then 3x3 convolutions of stride 2 and GroupNorm, the
    first of them on the coarsest map that comes in, each other on the one before.

    dims: width of every map, finest first. num_extra: coarser maps that are made.
    """

    def __init__(self, dims: Sequence[int], dim: int, *, num_extra: int = 1, num_groups: int = 32) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_conv_norm(width, dim, 1, num_groups) for width in dims)
        widths = [dims[-1], *[dim] * num_extra][:num_extra]
        self.extras = nn.ModuleList(_conv_norm(width, dim, 3, num_groups) for width in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, C, h, w), finest first -> (B, D, h, w) of each, and of those behind them."""
        levels = [layer(x) for layer, x in zip(self.maps, maps, strict=True)]
        last = maps[-1]
        for layer in self.extras:
            last = layer(last)
            levels.append(last)
        return levels


def _conv_norm(dim: int, out_dim: int, kernel: int, num_groups: int) -> nn.Sequential:
    stride, padding = (1, 0) if kernel == 1 else (2, 1)
    conv = nn.Conv2d(dim, out_dim, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(num_groups, out_dim))
