"""RoIAlign where the boxes are the windows of a grid that tiles the map: two small matrices.

Bilinear samples of a box that lies along the axes, and the mean over a bin of them, come apart into rows and
columns, so that pooling all windows is a product with a matrix from the left and one from the right. Values
are those of torchvision's `roi_align` with aligned=False and sampling_ratio=-1, which LLaVA-UHD v2 (arXiv
2412.13871, equations 5 and 6) uses: a window has a side of one cell at least, and a bin averages as many
samples as it has cells, rounded up.
Letters: B batch, C channels, (H, W) the map, (rows, cols) windows, (r, c) bins of a window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepwell.ops.precision import at_least_single, without_autocast
from stepwell.structures import Size

__all__ = ["pooling_matrix", "window_edges", "window_pool"]


def window_pool(x: Tensor, grid: Size, bins: Size, *, edges: torch.dtype | None = None) -> Tensor:
    """x (B, C, H, W), grid (rows, cols), bins (r, c) -> (B, rows*cols, r*c, C), windows and bins row-major.

    In fp32 at least, and then in the dtype of `x`. edges: the dtype that those of the windows are rounded
    to; that of `x`, as in the released code.
    """
    exact = at_least_single(x.dtype)
    of_rows, of_cols = (
        pooling_matrix(length, windows, parts, edges or x.dtype, device=x.device).to(exact)
        for length, windows, parts in zip(x.shape[-2:], grid, bins, strict=True)
    )
    cells = x.movedim(1, -1).to(exact)  # (B, H, W, C)
    with without_autocast(x.device):
        pooled = of_cols @ (of_rows @ cells.flatten(2)).unflatten(2, cells.shape[2:])
    windows = pooled.unflatten(2, (grid[1], bins[1])).unflatten(1, (grid[0], bins[0]))
    out: Tensor = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.to(x.dtype)


def pooling_matrix(
    length: int,
    windows: int,
    bins: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """(windows * bins, length), in fp32 at least: times the cells of an axis, the mean of every bin.

    dtype: to which the edges of the windows are rounded. The rest is computed in it too, but in fp32 at
    least: the number of samples hangs on the last bit.
    """
    exact = at_least_single(dtype)
    edges = window_edges(length, windows, dtype, device=device).to(exact)[:, None, None]
    start, side = edges[:-1], edges.diff(dim=0).clamp(min=1)
    step, samples = side / bins, (side / bins).ceil()
    widest = max(1.0, length / windows + 2 * length * torch.finfo(dtype).eps)  # rounded edges included
    # Axes from here on: windows, bins, samples; and then cells.
    part = torch.arange(bins, dtype=exact, device=device)[:, None]
    sample = torch.arange(math.ceil(widest / bins), dtype=exact, device=device)
    place = start + part * step + (sample + 0.5) * step / samples
    counts = (
        (sample < samples) & (place >= -1) & (place <= length)
    )  # there is nothing beyond one cell outside
    distance = place.clamp(0, length - 1)[..., None] - torch.arange(length, dtype=exact, device=device)
    shares = (1 - distance.abs()).clamp(min=0) * counts[..., None]  # bilinear, of every cell
    return (shares.sum(2) / samples).flatten(0, 1)


def window_edges(
    length: int, windows: int, dtype: torch.dtype, *, device: torch.device | str | None = None
) -> Tensor:
    """(windows + 1,), in cells from the left edge of the first."""
    edges = torch.arange(windows + 1, dtype=torch.float64, device="cpu") * length / windows
    return edges.to(dtype).to(device or torch.get_default_device())  # not every device has fp64
