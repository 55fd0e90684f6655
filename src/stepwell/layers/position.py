"""Position embeddings and relative position biases, and what happens to them on another grid.

PIIP, arXiv 2501.07783, resizes everything bicubically without antialiasing and without rescaling magnitudes,
also patch kernels. Letters: C width, (H, W) a grid in cells, h heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.structures import Size

__all__ = [
    "cubic_spline_weights",
    "fraction_embedding",
    "place_embedding",
    "relative_bias",
    "resample_relative_table",
    "resize_patch_kernel",
    "resize_position_table",
    "sincos_embedding",
]


def resize_position_table(table: Tensor, source: Size, target: Size, *, class_slot: bool = False) -> Tensor:
    """([1 +] h*w, C) on grid source = (h, w) -> ([1 +] H*W, C) on grid target = (H, W).

    Bicubic by target size, corners not aligned, in fp32. A class slot in row 0 is never interpolated.
    """
    expected = source[0] * source[1] + class_slot
    if table.shape[0] != expected:
        raise ValueError(f"a position table for grid {source} has {expected} rows, this one {table.shape[0]}")
    if source == target:
        return table
    slot, cells = table[:class_slot], table[class_slot:]
    map = cells.unflatten(0, source).permute(2, 0, 1)[None].float()  # bicubic weights need fp32
    map = F.interpolate(map, target, mode="bicubic", align_corners=False)
    return torch.cat([slot, map[0].flatten(1).t().to(table.dtype)])


def resize_patch_kernel(kernel: Tensor, patch: int) -> Tensor:
    """(C, 3, p, p) -> (C, 3, patch, patch), bicubic as above; the magnitude of the sum is not kept."""
    if kernel.shape[-2:] == (patch, patch):
        return kernel
    resized = F.interpolate(kernel.float(), (patch, patch), mode="bicubic", align_corners=False)
    return resized.to(kernel.dtype)


def sincos_embedding(dim: int, size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """Sine-cosine position embedding of cell centres, (H*W, dim) in fp32, size = (H, W).

    Coordinates are normalised by the longer side, so that the embedding of a point does not depend on
    resolution. A quarter of the channels each for sin and cos of the row and of the column, at frequencies
    that grow geometrically from half a turn across the longer side to one turn in four cells of a 128-cell
    side.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sine-cosine embedding needs a width divisible by 4, got {dim}")
    rows, cols = ((torch.arange(side, device=device) + 0.5) / max(size) for side in size)
    frequencies = math.pi * torch.logspace(0, math.log10(64), dim // 4, device=device)
    codes = [
        torch.cat([torch.sin(a), torch.cos(a)], 1)
        for a in (rows[:, None] * frequencies, cols[:, None] * frequencies)
    ]
    code = torch.cat([codes[0][:, None].expand(*size, -1), codes[1][None].expand(*size, -1)], dim=2)
    return code.flatten(0, 1)


def fraction_embedding(
    fractions: Tensor, dim: int, *, longest: float = 2.0, shortest: float = 0.07
) -> Tensor:
    """(N,) fractions of an image's side -> (N, dim): sines, then cosines, of dim // 2 wavelengths.

    The embedding of "Attention is all you need" (arXiv 1706.03762, section 3.5) for fractions; wavelengths
    fall geometrically from `longest` to `shortest`.
    """
    steps = torch.linspace(0, 1, dim // 2, device=fractions.device)
    angles = fractions[:, None] * (2 * math.pi / (longest * (shortest / longest) ** steps))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def place_embedding(dim: int, size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """(H*W, dim) in fp32: the fraction embeddings of a cell's column and of its row, half of the channels
    each.

    Unlike `sincos_embedding` it counts each side for itself, as boxes written as fractions do.
    """
    if dim % 4:
        raise ValueError(f"an embedding of columns and rows needs a width divisible by 4, got {dim}")
    rows, cols = (fraction_embedding((torch.arange(n, device=device) + 0.5) / n, dim // 2) for n in size)
    return torch.cat([cols.expand(*size, -1), rows[:, None].expand(*size, -1)], dim=2).flatten(0, 1)


def relative_bias(table: Tensor, grid: Size) -> Tensor:
    """((2H-1)*(2W-1), h) per offset -> (h, H*W, H*W) per query and key, grid = (H, W).

    Row (dr + H-1) * (2W-1) + (dc + W-1) is for a query dr rows below and dc columns right of its key (BEiT).
    """
    H, W = grid
    offsets = table.unflatten(0, (2 * H - 1, 2 * W - 1))
    views: Tensor = offsets.unfold(0, H, 1).unfold(
        1, W, 1
    )  # (H, W, h, H, W): [r, c, :, a, b] = offsets[r + a, c + b]
    return views.flip(3, 4).permute(2, 0, 1, 3, 4).reshape(table.shape[1], H * W, H * W)


def resample_relative_table(table: Tensor, source: Size, target: Size) -> Tensor:
    """((2h-1)*(2w-1), heads) for windows of source = (h, w) -> ((2H-1)*(2W-1), heads) for target = (H, W).

    BEiT's way: known offsets are placed at 0, 1, 1 + q, 1 + q + q^2, ... with q such that the outermost falls
    on the target's, and a cubic spline surface through them is read at whole offsets. So near offsets keep
    their values, and far ones are stretched. A side that does not change is left as it is.
    """
    if source == target:
        return table
    rows, cols = (_offset_weights(a, b) for a, b in zip(source, target, strict=True))
    offsets = table.unflatten(
        0, (2 * source[0] - 1, 2 * source[1] - 1)
    ).double()  # splines are solved in fp64
    resampled = torch.einsum("ar,rch,bc->abh", rows.to(table.device), offsets, cols.to(table.device))
    return resampled.flatten(0, 1).to(table.dtype)


def _offset_weights(source: int, target: int) -> Tensor:
    """(2 * target - 1, 2 * source - 1): offsets of the target window from those of the source window."""
    if source == target:
        return torch.eye(2 * source - 1, dtype=torch.float64)
    growth, low, high = 1.0, 1.01, 1.5
    while high - low > 1e-6:
        growth = (low + high) / 2
        outermost = (1 - growth ** (source - 1)) / (1 - growth)
        low, high = (low, growth) if outermost > target - 1 else (growth, high)
    distances = torch.cumsum(growth ** torch.arange(source - 1, dtype=torch.float64), 0)
    places = torch.cat([-distances.flip(0), distances.new_zeros(1), distances])
    return cubic_spline_weights(places, torch.arange(1 - target, target, dtype=torch.float64))


def cubic_spline_weights(x: Tensor, at: Tensor) -> Tensor:
    """x (n,) increasing, at (m,) -> (m, n): times values at x, it reads the not-a-knot cubic spline at `at`.

    Outside [x_0, x_n-1] the border value is taken. n is at least 4.
    """
    n, h = len(x), x.diff()
    if n < 4:
        raise ValueError(f"a not-a-knot cubic spline needs 4 points, got {n}")
    # Second derivatives M solve `left @ M = right @ y`: first derivatives agree inside, third ones at the
    # second point and the last but one.
    left, right = x.new_zeros(n, n), x.new_zeros(n, n)
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i, i - 1 : i + 2] = 6 * torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    left[0, :3] = torch.stack([h[1], -h[0] - h[1], h[0]])
    left[-1, -3:] = torch.stack([h[-1], -h[-1] - h[-2], h[-2]])
    curvature = torch.linalg.solve(left, right)
    at = at.clamp(x[0], x[-1])
    left_of = torch.searchsorted(x, at, right=True).clamp(1, n - 1) - 1  # x[left_of] <= at <= x[left_of + 1]
    width = h[left_of, None]
    b = (at - x[left_of])[:, None] / width
    a = 1 - b
    unit = torch.eye(n, dtype=x.dtype)
    bend = (a**3 - a) * curvature[left_of] + (b**3 - b) * curvature[left_of + 1]
    weights: Tensor = a * unit[left_of] + b * unit[left_of + 1] + bend * width**2 / 6
    return weights
