"""An average of a model's weights over the steps of a training, the later ones counting most.

Polyak and Juditsky 1992, as timm and DeiT (arXiv 2012.12877) keep it: exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from stepwell.train.recipe import Average

__all__ = ["Averaging"]

_FILE = "average.safetensors"  # of a checkpoint


class Averaging(TrainerCallback):
    """Averages a module's parameters behind every step; buffers are the last. Checkpoints hold it."""

    def __init__(self, module: nn.Module, average: Average) -> None:
        self.settings, self.module = average, module
        self.averaged = AveragedModel(module, multi_avg_fn=self._mix)
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """A module like the one that is trained, with the averaged weights."""
        return self.averaged.module

    @torch.no_grad()
    def _mix(self, averaged: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor | int) -> None:
        decay, count = self.settings.decay, int(steps)
        if self.settings.ramp:
            decay = min(decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the average of the checkpoint that the training goes on from."""
        self.averaged.to(args.device)
        if state.global_step:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
            load_model(self.averaged, file, device=str(args.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.averaged.update_parameters(self.module)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            save_model(self.averaged, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE)
