"""How exactly a few things are computed, whatever a model's own precision is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["at_least_single", "has_autocast", "product_dtype", "without_autocast"]


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, and what is finer as it is."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which the products of a layer with parameters of `dtype` are computed: autocast may have its own."""
    if has_autocast(device) and dtype.is_floating_point and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would round what is computed in single precision on purpose."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device) else nullcontext()


def has_autocast(device: torch.device) -> bool:
    """Whether autocast is on; the meta device does not answer."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
