"""The two-layer perceptron of a transformer block, the activations it may have, and the scale after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.layers.linear import Linear
from stepwell.ops.parts import in_parts

__all__ = ["Activation", "LayerScale", "Mlp"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


def _quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, by erf
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # PIIP's "fused_mlp"
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
}


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), token by token; the hidden layer of many tokens is not held whole."""

    def __init__(self, dim: int, *, hidden_dim: int, activation: Activation = "gelu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {sorted(_ACTIVATIONS)}")
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        activation = _ACTIVATIONS[self.activation]
        tokens = x.flatten(0, -2)[None]
        return in_parts(lambda part: self.fc2(activation(self.fc1(part))), tokens).view_as(x)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class LayerScale(nn.Module):
    """A learned factor per channel of a residual path (CaiT, Touvron et al., arXiv 2103.17239).

    `init` None: no factor and no parameter.
    """

    def __init__(self, dim: int, *, init: float | None) -> None:
        super().__init__()
        self.init = init
        self.gamma = None if init is None else nn.Parameter(torch.full((dim,), float(init)))

    def reset_parameters(self) -> None:
        if self.gamma is not None and self.init is not None:
            nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """gamma * x, (..., dim)."""
        return x if self.gamma is None else self.gamma * x
