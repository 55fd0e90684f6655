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
    cells = x.permute(0, 2, 3, 1).reshape(-1, C)
    if torch.is_grad_enabled():
        blocks = cells @ weight.permute(0, 2, 3, 1).flatten(1) + bias.repeat(4)
        out = blocks.view(B, H, W, 2, 2, -1).transpose(2, 3).reshape(B, 2 * H, 2 * W, -1)
    else:  # one corner of the blocks at a time, so that nothing of the result's size is held beside it
        out = x.new_empty(B, H, 2, W, 2, weight.shape[1])
        for i in range(2):
            for j in range(2):
                out[:, :, i, :, j] = torch.addmm(bias, cells, weight[:, :, i, j]).view(B, H, W, -1)
        out = out.flatten(3, 4).flatten(1, 2)
    return out.permute(0, 3, 1, 2)
