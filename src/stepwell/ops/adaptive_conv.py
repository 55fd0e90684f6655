"""Adaptive convolution: a kernel of its own for every pixel, one for all channels.

The sum of joint bilateral upsampling (FeatUp, arXiv 2403.10516, section 3.2.1; LLaVA-UHD v2, arXiv
2412.13871, equation 2). Letters: B batch, C channels, (H, W) the result, K the kernel's side; offsets in a
kernel go row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["adaptive_conv", "adaptive_conv_reference", "reflect"]


def adaptive_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """x (B, C, H + K - 1, W + K - 1), kernels (B, K*K, H, W) -> (B, C, H, W), in the dtype of `x`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return adaptive_conv_reference(x.to(exact), kernels.to(exact)).to(x.dtype)


def adaptive_conv_reference(x: Tensor, kernels: Tensor) -> Tensor:
    """As `adaptive_conv`, both of one dtype."""
    height, width = kernels.shape[-2:]
    side = x.shape[-1] - width + 1
    out = x.new_zeros(*x.shape[:2], height, width)
    for offset in range(side * side):
        row, col = divmod(offset, side)
        out = out + x[:, :, row : row + height, col : col + width] * kernels[:, offset, None]
    return out


def reflect(x: Tensor, radius: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H + 2 * radius, W + 2 * radius), mirrored at the border pixels.

    A side of `radius` pixels or fewer is mirrored again and again, where torch refuses; a single one repeats.
    """
    if min(x.shape[-2:]) > radius:
        return F.pad(x, (radius,) * 4, mode="reflect")
    for axis in (-2, -1):
        x = x.index_select(axis, _mirrored(x.shape[axis], radius).to(x.device))
    return x


def _mirrored(length: int, radius: int) -> Tensor:
    """Where each pixel of a padded side comes from."""
    place = torch.arange(-radius, length + radius)
    if length == 1:
        return torch.zeros_like(place)
    place = place.remainder(2 * length - 2)
    return torch.minimum(place, 2 * length - 2 - place)
