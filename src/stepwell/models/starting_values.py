"""Values for the parameters that a folder does not bring, which transformers leaves to its models.

Every module of ours sets its own when it is built, and again when asked by `reset_parameters`: those that it
holds itself, and what it wishes of modules below it.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["keep_built", "reset", "start_missing"]


def reset(module: nn.Module) -> None:
    """The starting values of a module, unless all of it has its own; for `PreTrainedModel._init_weights`.

    transformers guards what it loaded against torch's initialisers alone, and other libraries have their own.
    """
    parameters = list(module.parameters())
    if not parameters or not all(getattr(p, "_is_hf_initialized", False) for p in parameters):
        _start(module)


def _start(module: nn.Module) -> None:
    if (start := getattr(module, "reset_parameters", None)) is not None:
        start()


def keep_built(network: nn.Module) -> None:
    """For `post_init`: parameters that have their values, not on the meta device, are not set again."""
    for parameter in network.parameters():
        if not parameter.is_meta:
            _mark(parameter)


@torch.no_grad()
def start_missing(network: nn.Module) -> None:
    """For `PreTrainedModel.initialize_weights`: values as in a new network for all that was not loaded.

    A module may want something of the ones below it, so all of it is started anew, from below, and what was
    loaded is put back.
    """
    parameters = list(network.parameters())
    kept = [(p, p.detach().clone()) for p in parameters if getattr(p, "_is_hf_initialized", False)]
    if len(kept) == len(parameters):
        return
    for module in reversed(list(network.modules())):
        _start(module)
    for parameter, values in kept:
        parameter.copy_(values)
    for parameter in parameters:
        _mark(parameter)


def _mark(parameter: nn.Parameter) -> None:
    """As transformers marks what it loaded."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
