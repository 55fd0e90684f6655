"""torch's linear layer, by the quickest product that the machine has."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.products import linear

__all__ = ["CellLinear", "Linear", "is_plain"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, and an instance of it: adapters and initialisers find it as they would."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weight says all that the layer does, so that it may be joined with others: no adapter
    is around it, no quantised weight in it, and nothing brings its weight, or the rest of it, when it is
    called.
    """
    if type(layer) not in (Linear, CellLinear) or hasattr(layer, "_hf_hook"):
        return False
    weight = layer.weight
    is_here = type(weight) in (nn.Parameter, Tensor) and not hasattr(weight, "ds_id")
    return is_here and weight.shape == (layer.out_features, layer.in_features)


class CellLinear(Linear):
    """The same on every cell of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features, H, W) -> (B, out_features, H, W)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
