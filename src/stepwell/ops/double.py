"""Twice the size by a learned 2x2 block per cell: the transposed convolution whose kernel is its stride.

ViTDet, arXiv 2203.16527, section 3, doubles maps so. No two blocks overlap, hence it is one matrix product;
CPU libraries take a general path for it that is several times slower and holds several copies of the result.
Letters: B batch, C and E widths, (H, W) the map that comes in.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import choose
from stepwell.ops.parts import in_parts
from stepwell.ops.products import linear

__all__ = ["double_map", "double_map_fast", "double_map_reference"]

MOST_CELLS = 1024  # of one matrix product: enough for its full rate


def double_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (C, E, 2, 2), bias (E,) -> (B, E, 2*H, 2*W)."""
    fast = choose(fast_ok=x.device.type in ("cpu", "meta"), why_not="doubling has a fast twin on CPU only")
    return (double_map_fast if fast else double_map_reference)(x, weight, bias)


def double_map_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `double_map`."""
    return F.conv_transpose2d(x, weight, bias, stride=2)


def double_map_fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `double_map`, with the result in channels-last memory."""
    batch, _, height, width = x.shape
    blocks, bias = weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4)  # (4*E, C), (4*E,)

    def double(lines: Tensor) -> Tensor:
        """(B, h, W, C) -> (B, h, 2, W, 2*E)."""
        products: Tensor = linear(lines, blocks, bias).unflatten(3, (2, -1))
        return products.transpose(2, 3)

    out = in_parts(double, x.permute(0, 2, 3, 1), most=max(1, MOST_CELLS // width))
    return out.reshape(batch, 2 * height, 2 * width, weight.shape[1]).permute(0, 3, 1, 2)
