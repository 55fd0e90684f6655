"""A depthwise convolution that meets images of all sizes on a GPU.

cuDNN plans anew for every shape that it has not seen, a quarter of a second forward and half a second back
(3x3 and 7x7, H100, cuDNN 9, torch 2.11), so a training on images of many sizes does little else. torch's own
depthwise kernels need no plan and are as quick; they are those that it takes where cuDNN is switched off.
Letters: B batch, C channels, (H, W) a map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import preferred

__all__ = ["depthwise", "depthwise_fast", "depthwise_reference"]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W), weight (C, 1, k, k) with k odd, bias (C,) -> (B, C, H, W), zeros around."""
    is_faster = x.is_cuda and preferred() != "reference" and not torch.compiler.is_compiling()
    return (depthwise_fast if is_faster else depthwise_reference)(x, weight, bias)


def depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `depthwise`."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def depthwise_fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `depthwise`."""
    if torch.is_autocast_enabled(x.device.type):  # which casts for convolutions, and does not look inside
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _OwnKernels.apply(x, weight, bias)
    return out


class _OwnKernels(torch.autograd.Function):
    """The convolution and its derivative without cuDNN, which torch asks for again on the way back."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with _without_cudnn():
            return depthwise_reference(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        padding = weight.shape[-1] // 2
        with _without_cudnn():
            return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
                grad,
                x,
                weight,
                [len(weight)] if ctx.has_bias else None,
                stride=[1, 1],
                padding=[padding, padding],
                dilation=[1, 1],
                transposed=False,
                output_padding=[0, 0],
                groups=len(weight),
                output_mask=ctx.needs_input_grad,
            )


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
