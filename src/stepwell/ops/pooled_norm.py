"""A map that is projected, normed and pooled to windows, pooled first: few cells are left to be projected.

With weight W and bias b of the projection, gain g and shift t of a LayerNorm over its D channels, a normed
cell is g (W' x + b') / s(x) + t. W' and b' are W and b less their means over the channels, and s(x)^2, the
mean square of W' x + b', is a quadratic form in x that needs no projected x. As pooling is linear, windows of
normed cells are one matrix times windows of x / s, of 1 / s and of 1.
Letters: B batch, C and D channels before and behind the projection, (H, W) the map, n windows, k bins each.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell.ops.parts import in_parts
from stepwell.ops.precision import at_least_single
from stepwell.ops.products import linear
from stepwell.ops.window_pool import window_pool
from stepwell.structures import Size

__all__ = ["Deviation", "norm_of_pooled", "pool_for_norm"]

BLOCK = 256  # channels at a time, and rows of the form: half of a symmetric one is enough, and a bit more
MOST = 2048  # cells of a part


class Deviation(NamedTuple):
    """s(x), in fp32 at least."""

    form: Tensor  # (C, C): the quadratic form's lower triangle, with what is above the diagonal added to it
    line: Tensor  # (C,)
    constant: Tensor  # ()
    eps: float

    def of(self, cells: Tensor) -> Tensor:
        """(..., C) -> (...)."""
        cells = cells.to(torch.promote_types(cells.dtype, self.form.dtype))
        square = cells @ self.line + self.constant
        for start in range(0, len(self.form), BLOCK):
            rows = self.form[start : start + BLOCK, : start + BLOCK]
            products = linear(cells[..., : start + BLOCK], rows)
            square = square + (products * cells[..., start : start + BLOCK]).sum(-1)
        return (square.clamp(min=0) + self.eps).sqrt()  # rounded, a square may be less than nothing


def norm_of_pooled(
    weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, *, eps: float
) -> tuple[Deviation, Tensor]:
    """weight (D, C) and bias (D,) of the projection, gain and shift (D,) of the norm -> s, and the matrix
    (D, C + 2) by which the windows of `pool_for_norm` are multiplied.
    """
    weight, bias, gain, shift = (x.to(at_least_single(x.dtype)) for x in (weight, bias, gain, shift))
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    form = weight.t() @ weight / len(weight)
    deviation = Deviation(
        form.tril() + form.tril(-1), 2 * (bias @ weight) / len(weight), bias.square().mean(), eps
    )
    return deviation, torch.cat([gain[:, None] * weight, torch.stack([gain * bias, shift], 1)], 1)


def pool_for_norm(x: Tensor, deviation: Deviation, grid: Size, bins: Size, *, edges: torch.dtype) -> Tensor:
    """x (B, C, H, W) -> (B, n, k, C + 2), in fp32 at least; grid, bins and edges as of `window_pool`."""
    scale = in_parts(deviation.of, x.flatten(2).transpose(1, 2), most=MOST).reciprocal()
    scale = scale.unflatten(1, x.shape[2:])[:, None]
    planes = torch.cat([scale, torch.ones_like(scale)], 1)
    scaled = (channels * scale for channels in x.split(BLOCK, dim=1))  # never held whole
    return torch.cat([window_pool(part, grid, bins, edges=edges) for part in chain(scaled, [planes])], -1)
