"""Whether what a model tells are numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_finite"]


def check_finite(*outputs: Tensor) -> None:
    """Raises ValueError where one is infinite or none: no score of those is above a threshold, so that a
    broken model would seem to find nothing.
    """
    if not bool(torch.stack([output.isfinite().all() for output in outputs]).all()):
        raise ValueError(
            "the model's outputs are no numbers: its weights are damaged, or too large for its precision; "
            "another --dtype may help"
        )
