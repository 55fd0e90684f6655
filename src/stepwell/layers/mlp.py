"""The two-layer perceptron of a transformer block, the activations it may have, and the scale after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.ops.choose import choose

__all__ = ["ACTIVATIONS", "Activation", "LayerScale", "Mlp", "gelu"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


def _may_overwrite() -> bool:
    """On the fast path, where no gradient is recorded."""
    return not torch.is_grad_enabled() and choose(fast_ok=True, why_not="")


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU of a tensor that nothing else reads: on the fast path it is overwritten.

    On large maps half of the time goes into fetching memory for a second tensor.
    """
    if not _may_overwrite():
        return F.gelu(x, approximate=approximate)
    overwritten: Tensor = torch.ops.aten.gelu_(x, approximate=approximate)
    return overwritten


def _quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation, x * sigmoid(1.702 x)."""
    if not _may_overwrite():
        return x * torch.sigmoid(1.702 * x)
    return (1.702 * x).sigmoid_().mul_(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,  # exact, by erf
    "gelu_tanh": partial(gelu, approximate="tanh"),  # PIIP's "fused_mlp"
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
}


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), token by token."""

    def __init__(self, dim: int, *, hidden_dim: int, activation: Activation = "gelu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {sorted(ACTIVATIONS)}")
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.fc2(ACTIVATIONS[self.activation](self.fc1(tokens)))
        return out

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, Touvron et al., arXiv 2103.17239); none where `init` is None."""

    def __init__(self, dim: int, *, init: float | None) -> None:
        super().__init__()
        self.gamma = None if init is None else nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return x if self.gamma is None else x * self.gamma
