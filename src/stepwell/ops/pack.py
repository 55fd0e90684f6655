"""Images of any sizes as one tensor: a row a pixel, input after input.

What is packed apart joins by `torch.cat`, and nothing is padded. Letters: P pixels of all inputs, (h, w) a
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.structures import Size

__all__ = ["pack", "unpack"]


def pack(inputs: Sequence[Tensor]) -> Tensor:
    """(3, h, w) each -> (P, 3)."""
    return torch.cat([image.flatten(1).T for image in inputs])


def unpack(pixels: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """pixels (P, 3), sizes (h, w) of the inputs in order -> (3, h, w) each, a view whose channels come last.

    Raises ValueError where the pixels are not as many as the sizes say.
    """
    counts = [height * width for height, width in sizes]
    if pixels.ndim != 2 or sum(counts) != len(pixels):
        raise ValueError(
            f"inputs of these images have {sum(counts)} pixels, but pixel_values is {tuple(pixels.shape)}; "
            "it holds a row a pixel: pass on all that the processor returns"
        )
    parts = pixels.split(counts)
    return [part.unflatten(0, size).permute(2, 0, 1) for part, size in zip(parts, sizes, strict=True)]
