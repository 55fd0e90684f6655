"""Networks whose norms take statistics over a batch in training, and what they then need."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchStatistics"]


class BatchStatistics(nn.Module):
    """A network that may have such norms; `gradient_checkpointing` is what was asked of it."""

    gradient_checkpointing: bool

    def train(self, mode: bool = True) -> BatchStatistics:
        """As torch has it; the statistics of norms that do not learn stay what they are."""
        super().train(mode)
        for norm in _norms(self):
            if not any(parameter.requires_grad for parameter in norm.parameters()):
                norm.eval()
        return self

    @property
    def checkpointing(self) -> bool:
        """Layers are recomputed in the backward pass; none that would count batch statistics twice."""
        if not (self.gradient_checkpointing and self.training):
            return False
        return not any(norm.training for norm in _norms(self))


def _norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]
