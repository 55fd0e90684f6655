"""The same picture at several sizes, one for each branch.

PIIP, arXiv 2501.07783, section III-A: large pictures go to small networks. Two geometries:
- any aspect (new models): `pyramid_sizes` keeps the picture's shape without padding. Side j is a whole number
  k of steps u_j; the steps have the ratios of `sides` exactly and divide by the strides, so the branches show
  the picture at exactly the same shape, for any k a picture's height and width ask for.
- as published: `scaled_size`, sides rounded down to whole pixels.
In both, `image_pyramid` makes the smaller pictures from the largest. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from stepwell.structures import Size

__all__ = ["exact_ratio", "image_pyramid", "pyramid_sizes", "scaled_size"]


def pyramid_sizes(
    size: Size, *, sides: Sequence[int], strides: Sequence[int], min_cells: int = 1
) -> tuple[Size, ...]:
    """Sizes of one picture in all branches: its long side becomes `sides`, its short side follows its aspect.

    size: of the picture. sides, strides: of each branch. The short side has at least `min_cells` cells of a
    stride in every branch; where the aspect cannot be kept because of that, it is bent.
    Raises ValueError if a side does not divide by its stride, or if no picture but a square one would fit.
    """
    steps = _steps(sides, strides)
    most = sides[0] // steps[0]
    least = max(-(-min_cells * stride // step) for stride, step in zip(strides, steps, strict=True))
    if least > most:
        raise ValueError(f"{min_cells} cells of strides {list(strides)} do not fit into sides {list(sides)}")
    long, short = max(size), min(size)
    if short < 1:
        raise ValueError(f"a picture needs at least one pixel each way, got {size[0]}x{size[1]}")
    nearest = (2 * most * short + long) // (2 * long)
    across = min(max(nearest, least), most)
    height, width = (most if side == long else across for side in size)
    return tuple((height * step, width * step) for step in steps)


def _steps(sides: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The smallest steps, one a branch, in the exact ratios of the sides, each divisible by its stride."""
    if len(sides) != len(strides) or not sides or min(*sides, *strides) < 1:
        raise ValueError(f"need one side and one stride a branch, got {list(sides)} and {list(strides)}")
    for side, stride in zip(sides, strides, strict=True):
        if side % stride:
            raise ValueError(
                f"a side of {side} does not divide by stride {stride}; take {side - side % stride}"
            )
    common = math.gcd(*sides)
    parts = [side // common for side in sides]
    times = math.lcm(*(stride // math.gcd(stride, part) for part, stride in zip(parts, strides, strict=True)))
    if common < 2 * times:
        raise ValueError(
            f"sides {list(sides)} share no step that divides by strides {list(strides)}, so every picture "
            f"would become a square; choose sides with a larger common divisor than {common}"
        )
    return [part * times for part in parts]


def exact_ratio(side: int, largest: int) -> float:
    """side / largest, as the first float not below it: rounding down then loses no pixel of an exact size."""
    ratio = side / largest
    numerator, denominator = ratio.as_integer_ratio()
    return ratio if numerator * largest >= side * denominator else math.nextafter(ratio, math.inf)


def scaled_size(size: Size, ratio: float) -> Size:
    """The size that `image_pyramid` gives a picture of `size`: each side times the ratio, rounded down."""
    return math.floor(size[0] * ratio), math.floor(size[1] * ratio)


def image_pyramid(image: Tensor, ratios: Sequence[float]) -> list[Tensor]:
    """(B, 3, H, W) -> one (B, 3, floor(H * ratio), floor(W * ratio)) a branch; the image itself for ratio 1.

    Bilinear, corners not aligned, no antialiasing. The ratio, not the size, is handed to torch, which then
    maps pixels by it even where a side was rounded down: so does the official code.
    """
    return [image if ratio == 1 else _rescale(image, ratio) for ratio in ratios]


def _rescale(image: Tensor, ratio: float) -> Tensor:
    if min(scaled_size((image.shape[-2], image.shape[-1]), ratio)) < 1:
        raise ValueError(f"nothing is left of {image.shape[-2]}x{image.shape[-1]} pixels at ratio {ratio:g}")
    return F.interpolate(image, scale_factor=ratio, mode="bilinear", align_corners=False)
