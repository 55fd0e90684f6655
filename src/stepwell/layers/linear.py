"""torch's linear layer, by the quickest product that the machine has."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.products import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, and an instance of it: adapters and initialisers find it as they would."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
