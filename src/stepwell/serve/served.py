"""What a model is to a server: it answers, or it predicts."""

from __future__ import annotations

from typing import Any

from stepwell.models.ask import Assistant
from stepwell.models.engine import TransformersEngine
from stepwell.models.predicting import Predicts
from stepwell.serve.chat import Chat
from stepwell.serve.predict import Predict
from stepwell.serve.settings import ServerSettings

__all__ = ["served"]


def served(model: Any, name: str, settings: ServerSettings) -> Chat | Predict:
    """model: of `stepwell.load`. Raises ValueError for one that answers and predicts nothing."""
    if isinstance(model, Assistant) and isinstance(model.engine, TransformersEngine):
        return Chat(model.engine, settings)
    if isinstance(model, Predicts):
        return Predict(model, max_pixels=settings.limits.max_pixels)
    raise ValueError(
        f"{name} answers and predicts nothing: it is a {type(model).__name__}; take an assistant, a "
        "detector, a segmenter or a classifier"
    )
