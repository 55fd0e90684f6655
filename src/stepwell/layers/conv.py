"""torch's convolution, quick to learn wherever its map comes from."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.planes import planes_to_learn_from

__all__ = ["Conv2d"]


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, and an instance of it: adapters and initialisers find it as they would."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        return super().forward(planes_to_learn_from(x, self.weight))
