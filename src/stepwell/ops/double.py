"""Twice the size by a learned 2x2 block per cell: the transposed convolution whose kernel is its stride.

ViTDet, arXiv 2203.16527, section 3, doubles maps so. No two blocks overlap, hence it is one matrix product;
CPU libraries take a general path for it that is several times slower and holds several copies of the result.
Letters: B batch, C, D and E widths, (H, W) the map that comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import choose
from stepwell.ops.parts import in_parts
from stepwell.ops.products import linear

__all__ = [
    "AnyMap",
    "Doubled",
    "double_map",
    "double_map_fast",
    "double_map_reference",
    "finished",
    "project",
]

MOST_CELLS = 1024  # of one matrix product: enough for its full rate
FEWEST_SAVED = 2**22  # products, below which a doubling and a projection are not worth joining


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


@dataclass(frozen=True, eq=False, slots=True)
class Doubled:
    """A map that is still to be doubled: what it is made of, for those who can do with less than the map."""

    x: Tensor  # (B, C, H, W)
    weight: Tensor  # (C, E, 2, 2)
    bias: Tensor  # (E,)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> torch.Size:
        """Of the map: (B, E, 2*H, 2*W)."""
        batch, _, height, width = self.x.shape
        return torch.Size((batch, self.weight.shape[1], 2 * height, 2 * width))

    def to(self, *args: Any, **kwargs: Any) -> Doubled:
        """As a tensor's."""
        return Doubled(*(x.to(*args, **kwargs) for x in (self.x, self.weight, self.bias)))

    def map(self) -> Tensor:
        return double_map(self.x, self.weight, self.bias)


AnyMap = Tensor | Doubled


def finished(x: AnyMap) -> Tensor:
    return x.map() if isinstance(x, Doubled) else x


def project(x: AnyMap, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of one pixel: x (B, E, H, W), weight (D, E, 1, 1), bias (D,) -> (B, D, H, W).

    Doubling and it are linear, so that one doubling by the product of their weights does both: at a fraction
    of the operations, and without the wide map between them.
    """
    if isinstance(x, Doubled):
        if choose() and _is_cheaper(x, len(weight)):
            return double_map(x.x, *_joined(x, weight, bias))
        x = x.map()
    return F.conv2d(x, weight, bias)


def _is_cheaper(x: Doubled, out_dim: int) -> bool:
    """Whether joining the weights takes fewer operations than it saves."""
    in_dim, dim = x.weight.shape[:2]
    cells = x.x.numel() // in_dim
    saved = cells * (in_dim * dim + dim * out_dim - in_dim * out_dim)
    return saved > max(in_dim * dim * out_dim, FEWEST_SAVED)


def _joined(x: Doubled, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> (C, D, 2, 2), (D,): the convolution behind the doubling."""
    rows = torch.cat([x.weight.movedim(1, -1).flatten(0, -2), x.bias[None]])  # (4*C + 1, E)
    products = linear(rows, weight.flatten(1).clone())  # rounding depends on where in memory a matrix begins
    joined = products[:-1].unflatten(0, (-1, 2, 2)).movedim(-1, 1)
    return joined, products[-1] if bias is None else products[-1] + bias
