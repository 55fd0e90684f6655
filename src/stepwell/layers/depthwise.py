"""torch's depthwise convolution, by kernels that take images of all sizes alike."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.depthwise import depthwise

__all__ = ["DepthwiseConv"]


class DepthwiseConv(nn.Conv2d):
    """`torch.nn.Conv2d` of `dim` channels, each with a kernel of its own; the map keeps its size.

    Raises ValueError for an even kernel_size.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)."""
        return depthwise(x, self.weight, self.bias)
