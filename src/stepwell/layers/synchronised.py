"""Batch norms whose batch is that of all processes which train together.

Ioffe and Szegedy, arXiv 1502.03167; torch's SyncBatchNorm does so on GPUs alone, this one on any device.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

__all__ = ["SynchronisedBatchNorm2d", "synchronised"]

Module = TypeVar("Module", bound=nn.Module)


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """While it learns in several processes; else, a batch norm like any other, whose weights it shares."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) of any batch and grid in each process -> the same."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            alone: Tensor = super().forward(x)
            return alone
        values = x.float()
        count = x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float32)
        totals = all_reduce(torch.cat([values.sum((0, 2, 3)), count]))
        number = totals[-1].detach()
        mean = totals[:-1] / number
        centred = values - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / number
        self._follow(mean.detach(), variance.detach(), number)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normed: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normed.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, number: Tensor) -> None:
        """Moves the running mean and variance, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * number / (number - 1).clamp(min=1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def synchronised(module: Module) -> Module:
    """Makes the batch norms of a module those of all processes, in place; names and weights stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
            child.__class__ = SynchronisedBatchNorm2d
    return module
