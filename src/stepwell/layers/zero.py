"""A zero that carries gradients to parameters which a batch has no use for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["zero_through"]


def zero_through(module: nn.Module) -> Tensor:
    """0, through which the parameters of `module` that learn have a gradient, of zeros.

    Without it a batch that has nothing for them ends a run where nothing else learns, and processes that
    train together wait.
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not learning:
        return next(module.parameters()).new_zeros((), dtype=torch.float32)
    return torch.stack([parameter.flatten()[0].float() for parameter in learning]).sum() * 0.0
