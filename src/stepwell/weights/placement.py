"""Where a model runs and in which precision, as users say it."""

from __future__ import annotations

import torch

from stepwell.folders import ModelError, one_line

__all__ = ["DTYPES", "Precision", "find_device", "find_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Precision = str | torch.dtype


def find_device(device: str | torch.device | None) -> torch.device:
    """None takes a GPU where there is one. Raises ModelError for a device that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {str(device)!r} cannot be used: {one_line(error)}") from None


def find_dtype(dtype: Precision | None) -> torch.dtype | None:
    """Raises ModelError for a name that is none of DTYPES."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype
