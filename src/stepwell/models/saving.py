"""What transformers' `save_pretrained` leaves to be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepwell.folders import share

__all__ = ["SharedWeights"]


class SharedWeights:
    """Of a PreTrainedModel, named before it: its weights may be read by whoever may read its settings, and
    each is there once.
    """

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if (weights := kwargs.get("state_dict")) is not None:  # gathered from processes, where ties are lost
            tied = getattr(self, "all_tied_weights_keys", {})
            kwargs["state_dict"] = {
                name: tensor for name, tensor in weights.items() if tied.get(name) not in weights
            }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for path in Path(save_directory).glob("*.safetensors"):
            share(path)
