"""Maps and logits at another size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = ["resize_map"]


def resize_map(x: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear by target size, corners not aligned, in fp32 at least."""
    if x.shape[-2:] == size:
        return x
    exact = x.to(at_least_single(x.dtype))
    return F.interpolate(exact, size, mode="bilinear", align_corners=False).to(x.dtype)
