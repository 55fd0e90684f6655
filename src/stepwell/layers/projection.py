"""A convolution of one pixel, which heads begin with."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.double import AnyMap, project

__all__ = ["Projection"]


class Projection(nn.Conv2d):
    """`torch.nn.Conv2d` of a 1x1 kernel, which also takes a map that is still to be doubled."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, 1, bias=bias)

    def forward(self, x: AnyMap) -> Tensor:
        """(B, in_dim, H, W) -> (B, out_dim, H, W)."""
        return project(x, self.weight, self.bias)
