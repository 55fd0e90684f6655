"""torch's linear layer, by the quickest product that the machine has."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.products import linear

__all__ = ["CellLinear", "Linear"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, and an instance of it: adapters and initialisers find it as they would."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


class CellLinear(Linear):
    """The same on every cell of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features, H, W) -> (B, out_features, H, W)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
