"""Derivatives of derivatives for a fast twin: its reference's.

A fast kernel's gradient is another fast kernel, and mostly that is where derivatives end. Whoever
differentiates a gradient (create_graph=True) gets everything from the reference instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["with_derivatives_of"]


def with_derivatives_of(reference: Callable[..., Tensor], inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """out, computed from `inputs` -> the same; where its gradient is differentiated, it is the reference's.

    No input may matter to `out` by another way. A compiled graph is left alone: torch itself refuses, in
    words, to differentiate its gradient.
    """
    if not out.requires_grad or torch.compiler.is_compiling():
        return out
    return _Derivatives.apply(reference, out, *inputs)  # type: ignore[no-any-return]


class _Derivatives(torch.autograd.Function):
    """Hands the gradient on to `out`; or, where it is recorded, past it to the inputs."""

    @staticmethod
    def forward(reference: Callable[..., Tensor], out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reference = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        is_needed = ctx.needs_input_grad[2:]
        if not torch.is_grad_enabled():
            return None, grad, *(None for _ in is_needed)
        inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]  # apart, if one was given twice
        sources = [tensor for tensor, needed in zip(inputs, is_needed, strict=True) if needed]
        gradients = iter(torch.autograd.grad(ctx.reference(*inputs), sources, grad, create_graph=True))
        return None, None, *(next(gradients) if needed else None for needed in is_needed)
