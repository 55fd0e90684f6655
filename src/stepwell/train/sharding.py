"""Weights in parts, one in every process: what FSDP gathers together.

Zhao et al., "PyTorch FSDP", arXiv 2304.11277. Processes that call such a unit unequally often wait for each
other for ever. A language model's layers are called once a step; how often those of a vision system are
depends on the images, and text has none: they stay with the whole model, which is gathered at its beginning.
"""

from __future__ import annotations

from torch import nn

from stepwell.models.assistant import StepwellForConditionalGeneration

__all__ = ["sharding_units"]


def sharding_units(module: nn.Module) -> list[str]:
    """Names of the classes in `module` of which each has its weights gathered for itself."""
    assistants = (part for part in module.modules() if isinstance(part, StepwellForConditionalGeneration))
    language_models = [part.model.language_model for part in assistants]
    named = {name for model in language_models for name in model._no_split_modules or ()}
    return sorted(named & {type(part).__name__ for model in language_models for part in model.modules()})
