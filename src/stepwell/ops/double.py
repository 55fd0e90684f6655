"""Twice the size by a learned 2x2 block per cell: the transposed convolution whose kernel is its stride.

ViTDet, arXiv 2203.16527, section 3, doubles maps so. No two blocks overlap, hence it is one matrix product;
CPU libraries take a general path for it that is several times slower and holds several copies of the result.
Letters: B batch, C and E widths, (H, W) the map that comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import choose

__all__ = ["double_map", "double_map_fast", "double_map_reference"]

MAX_CELLS = 1024  # of one product; enough for a matrix product to run at its full rate


def double_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (C, E, 2, 2), bias (E,) -> (B, E, 2*H, 2*W)."""
    fast = choose(fast_ok=x.device.type in ("cpu", "meta"), why_not="doubling has a fast twin on CPU only")
    return (double_map_fast if fast else double_map_reference)(x, weight, bias)


def double_map_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `double_map`."""
    return F.conv_transpose2d(x, weight, bias, stride=2)


def double_map_fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `double_map`, with the result in channels-last memory."""
    B, C, H, W = x.shape
    cells = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    halves = weight.permute(2, 0, 3, 1).flatten(2)  # (2, C, 2*E): of the blocks, the upper and the lower
    bias = bias.repeat(2)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # which would unroll the loop below
        out = torch.stack([cells @ half + bias for half in halves], 2)
    else:  # some lines at a time, so that next to nothing is held beside the result
        out = x.new_empty(B, H, 2, W, len(bias))
        lines = max(1, MAX_CELLS // W)
        for b in range(B):
            for top in range(0, H, lines):
                some = cells[b, top : top + lines]
                for i, half in enumerate(halves):
                    product = torch.addmm(bias, some.reshape(-1, C), half)
                    out[b, top : top + lines, i] = product.view(-1, W, len(bias))
    return out.view(B, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)
