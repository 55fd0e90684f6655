"""A linear layer's matrix product, in fp32 on processors where torch's own is slow.

torch's fp32 products are MKL's, which keeps its AVX-512 kernels for Intel's processors; elsewhere they run at
half of what the machine can do. Its convolutions are oneDNN's, which asks the processor what it has; a 1x1
convolution on channels-last memory is the same product, without a copy going in or out. Half precision is
oneDNN's in both.
Letters: M rows, K and N the widths that come in and go out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import has_slow_products, preferred

__all__ = ["linear", "linear_fast", "linear_reference"]

FEWEST_ROWS = 128
FEWEST_PRODUCTS = 2**25  # M * K * N; below either, calling a convolution costs more than its kernel saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> x weight^T + bias, (..., N)."""
    return (linear_fast if _is_faster(x, weight, bias) else linear_reference)(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`."""
    return F.linear(x, weight, bias)


def linear_fast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, of one row at least: the rows of x are the pixels of one image, K its channels."""
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, K, 1, M)
    out = F.conv2d(pixels, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether to take the convolution: a large fp32 product on a CPU, run and not compiled.

    `prefer("fast")` takes it on every processor; what stays is the library's product, which is fast there.
    """
    if preferred() == "reference" or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if preferred() == "auto" and not has_slow_products():
        return False
    single = all(tensor.dtype is torch.float32 for tensor in (x, weight, bias) if tensor is not None)
    if not single or torch.is_autocast_enabled("cpu"):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= FEWEST_ROWS and rows * weight.numel() >= FEWEST_PRODUCTS
