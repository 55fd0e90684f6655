"""Visual width -> language model width.

LLaVA (arXiv 2304.08485), equation 1: one linear layer; LLaVA-1.5 (arXiv 2310.03744), section 3: an MLP
of two. Shapes: B batch, N tokens.
"""

from __future__ import annotations

import re

from torch import nn

from stepwell.layers.linear import Linear

__all__ = ["build_projector"]


def build_projector(kind: str, in_dim: int, out_dim: int) -> nn.Module:
    """tokens (B, N, in_dim) -> (B, N, out_dim); the linears of an MLP are entries 0, 2, 4... of a Sequential.

    kind: "linear", "mlp2x_gelu" (or any other number of linears, with exact GELU between them) or "identity".
    Raises ValueError for any other kind, and for "identity" between different widths.
    """
    if kind == "linear":
        return Linear(in_dim, out_dim)
    if kind == "identity":
        if in_dim != out_dim:
            raise ValueError(f"an identity projector cannot turn width {in_dim} into {out_dim}; use 'linear'")
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(
            f"unknown projector {kind!r}; choose 'linear', 'mlp2x_gelu' (any number) or 'identity'"
        )
    layers: list[nn.Module] = [Linear(in_dim, out_dim)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), Linear(out_dim, out_dim)]
    return nn.Sequential(*layers)
