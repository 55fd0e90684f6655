"""The two norms of plain transformers, by name. Both accumulate in fp32 whatever the input's dtype."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NormKind", "RMSNorm", "build_norm"]

NormKind = Literal["layernorm", "rmsnorm"]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich, arXiv 1910.07467), as in InternViT-6B."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the input's dtype: mixed ones, as under autocast, would be slow."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build_norm(kind: NormKind, dim: int, *, eps: float) -> nn.Module:
    """A norm over the last axis, of width `dim`."""
    if kind == "layernorm":
        return nn.LayerNorm(dim, eps=eps)
    if kind == "rmsnorm":
        return RMSNorm(dim, eps=eps)
    raise ValueError(f"unknown norm {kind!r}; choose 'layernorm' or 'rmsnorm'")
