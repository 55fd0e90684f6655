"""How a map lies in memory before a convolution learns from it."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwell.ops.choose import choose

__all__ = ["planes_to_learn_from"]


def planes_to_learn_from(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, C, H, W) for a convolution by `weight`: channel behind channel where the weight learns on a CPU.

    There oneDNN takes up to four times as long for the gradient of a weight from channels-last memory, in
    which maps of tokens lie, and as long for everything else.
    """
    learns = torch.is_grad_enabled() and weight.requires_grad and x.device.type == "cpu"
    return x.contiguous() if learns and choose() and not torch.compiler.is_compiling() else x
