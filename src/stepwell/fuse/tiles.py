"""Tiles of tokens -> one map -> tokens row by row, a learned newline behind each row.

LLaVA-NeXT (llava-vl.github.io, January 2024, and its code). Letters: n tokens of a tile of (h, w) cells,
(H, W) the map that the tiles make, D width, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = ["TileMerge"]


class TileMerge(nn.Module):
    """The tokens of an overview and, behind them, those of the tiles as one map.

    newline: whether a learned vector of `dim` ends every row of the map, and an overview that has no tiles.
    """

    def __init__(self, dim: int, *, newline: bool) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.empty(dim)) if newline else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.newline is not None:
            nn.init.normal_(self.newline, std=len(self.newline) ** -0.5)

    def forward(
        self, overview: Tensor, tiles: Sequence[Tensor], *, grid: Size, tile: Size, kept: Size, size: Size
    ) -> Tensor:
        """overview (n, D), tiles (n, D) each, row by row -> (N, D).

        grid: rows and columns of tiles; tile: (h, w). kept: rows and columns in the middle of the map that
        are left of it; size: to which these are brought, bilinear.
        """
        whole = torch.stack(list(tiles)).unflatten(1, tile).unflatten(0, grid)  # (rows, cols, h, w, D)
        whole = whole.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (H, W, D)
        top, left = (whole.shape[0] - kept[0]) // 2, (whole.shape[1] - kept[1]) // 2
        whole = whole[top : top + kept[0], left : left + kept[1]]
        if size != kept:
            x = whole.permute(2, 0, 1)[None].to(at_least_single(whole.dtype))
            whole = F.interpolate(x, size, mode="bilinear")[0].permute(1, 2, 0).to(whole.dtype)
        return torch.cat([overview, self._rows(whole)])

    def alone(self, overview: Tensor) -> Tensor:
        """(n, D) -> (N, D): an overview that has no tiles is one row."""
        return self._rows(overview[None])

    def _rows(self, map: Tensor) -> Tensor:
        """(H, W, D) -> tokens (N, D)."""
        if self.newline is not None:
            map = torch.cat([map, self.newline.to(map.dtype).expand(len(map), 1, -1)], dim=1)
        return map.flatten(0, 1)
