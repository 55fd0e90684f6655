"""Stepwell reads big images well and cheaply.

    import stepwell
    model = stepwell.load()
    print(model.ask("receipt.jpg", "How much is the total?"))

Importing loads neither torch nor transformers: public names arrive when they are used, and the model classes
are registered with transformers' Auto classes as soon as those are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepwell.models.watch import register_when_needed

if TYPE_CHECKING:
    from stepwell.images.limits import ImageError as ImageError
    from stepwell.images.limits import ImageLimits as ImageLimits
    from stepwell.images.open import open_image as open_image
    from stepwell.models.ask import Assistant as Assistant
    from stepwell.models.assistant import StepwellForConditionalGeneration as StepwellForConditionalGeneration
    from stepwell.models.config import StepwellConfig as StepwellConfig
    from stepwell.models.parts import load_parts as load_parts
    from stepwell.models.processor import StepwellProcessor as StepwellProcessor
    from stepwell.ops.choose import prefer as prefer
    from stepwell.weights.load import load as load

__version__ = "0.1.0"

_ROOMS = {
    "Assistant": "models.ask",
    "ImageError": "images.limits",
    "ImageLimits": "images.limits",
    "StepwellConfig": "models.config",
    "StepwellForConditionalGeneration": "models.assistant",
    "StepwellProcessor": "models.processor",
    "load": "weights.load",
    "load_parts": "models.parts",
    "open_image": "images.open",
    "prefer": "ops.choose",
}

__all__ = [*_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'stepwell' has no attribute {name!r}")
    return getattr(import_module(f"stepwell.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])


register_when_needed()
