"""RoIAlign where the boxes are the windows of a grid that tiles the map: two small matrices.

Bilinear samples of a box that lies along the axes, and the mean over a bin of them, come apart into rows and
columns, so that pooling all windows is a product with a matrix from the left and one from the right. Values
are those of torchvision's `roi_align` with aligned=False and sampling_ratio=-1, which LLaVA-UHD v2 (arXiv
2412.13871, equations 5 and 6) uses: a window has a side of one cell at least, and a bin averages as many
samples as it has cells, rounded up.
Letters: B batch, C channels, (H, W) the map, (rows, cols) windows, (r, c) bins of a window.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stepwell.structures import Size

__all__ = ["pooling_matrix", "window_pool"]


def window_pool(x: Tensor, grid: Size, bins: Size) -> Tensor:
    """x (B, C, H, W), grid (rows, cols), bins (r, c) -> (B, rows*cols, r*c, C), windows and bins row-major.

    In fp32 at least, and then in the dtype of `x`; the edges of the windows are rounded to it, as in the
    released code.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    of_rows, of_cols = (
        pooling_matrix(length, windows, parts, x.dtype).to(x.device, exact)
        for length, windows, parts in zip(x.shape[-2:], grid, bins, strict=True)
    )
    cells = x.movedim(1, -1).to(exact)  # (B, H, W, C)
    pooled = of_cols @ (of_rows @ cells.flatten(2)).unflatten(2, cells.shape[2:])
    windows = pooled.unflatten(2, (grid[1], bins[1])).unflatten(1, (grid[0], bins[0]))
    out: Tensor = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.to(x.dtype)


@lru_cache(maxsize=256)
def pooling_matrix(length: int, windows: int, bins: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(windows * bins, length) in fp32: times the cells of an axis, the mean of each bin of each window.

    dtype: to which the edges of the windows are rounded.
    """
    edges = torch.tensor([i * length / windows for i in range(windows + 1)]).to(dtype).float()
    matrix = torch.zeros(windows * bins, length)
    for window in range(windows):
        start, side = edges[window], (edges[window + 1] - edges[window]).clamp(min=1)
        samples = int((side / bins).ceil())
        step = side / bins
        for part in range(bins):
            place = start + part * step + (torch.arange(samples) + 0.5) * step / samples
            matrix[window * bins + part] = _bilinear(place, length).sum(0) / samples
    return matrix


def _bilinear(place: Tensor, length: int) -> Tensor:
    """Places (n,) on an axis -> (n, length), the share of every cell; nothing beyond one cell outside."""
    is_inside = (place >= -1) & (place <= length)
    place = place.clamp(0, length - 1)
    cells = torch.arange(length)
    return (1 - (place[:, None] - cells).abs()).clamp(min=0) * is_inside[:, None]
