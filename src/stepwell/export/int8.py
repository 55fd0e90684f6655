"""Linear layers whose weights are stored in eight bits, for graphs: a quarter of the bytes.

A row of a weight is whole numbers from -127 to 127 times one number; activations stay as they are. A runtime
may multiply such weights as they are or bring them back to single precision first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Int8Linear", "store_in_int8"]


class Int8Linear(nn.Module):
    """A linear layer with its weight rounded, row by row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rows = layer.weight.detach().float()
        scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (rows / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight.float() * self.scale, self.bias)


def store_in_int8(module: nn.Module) -> int:
    """Puts an `Int8Linear` in the place of every linear layer inside; -> how many."""
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, Int8Linear(layer))
    return len(names)
