"""What transformers' `save_pretrained` leaves to be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepwell.folders import share

__all__ = ["SharedWeights"]


class SharedWeights:
    """Of a PreTrainedModel, named before it: its weights may be read by whoever may read its settings."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for path in Path(save_directory).glob("*.safetensors"):
            share(path)
