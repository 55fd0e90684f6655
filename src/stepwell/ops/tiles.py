"""Sums over the neighbours of every pixel, as matrix products.

Pixels that lie side by side read nearly the same cells. Cut into tiles of T x T pixels, a result is, tile by
tile, a matrix (T*T, U*V) of the tile's kernels, written over the U x V cells that the tile reads, times these
cells (U*V, C). Most of the matrix is zeros, and still a product with it takes a fraction of the time of a sum
of shifted maps. Such matrices are called a band here; their gradient, and that of the cells, are products of
the same kind. A cell that is no finite number reaches all pixels of the tiles that read it.

Neighbours need not be cells: each of them may be a sum of cells, along either side of the map by itself. A
map that is enlarged, or mirrored at its borders, need not be made.
Letters: B batch, C channels, (h, w) cells, (H, W) pixels, K the kernel's side, n and m rows and columns of
tiles; s and t count these, y and x the pixels of a tile, i and j their neighbours, u and v the tile's cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Axis", "Tiles"]

SIDE = 8  # T: larger tiles multiply more zeros, smaller ones copy every cell more often


class Axis(NamedTuple):
    """One side of a map: the tiles along it, and what each of them reads."""

    length: int  # in pixels
    num_cells: int
    cells: Tensor  # (n, U), those of every tile
    shares: Tensor  # (n, T, K, U), of every cell in every neighbour of every pixel

    @classmethod
    def of(cls, neighbours: Tensor, kernel: int) -> Axis:
        """neighbours (length + kernel - 1, cells): the share of every cell in every neighbour there is."""
        shares = neighbours.unfold(0, kernel, 1).transpose(1, 2)  # (length, K, cells)
        length, _, num_cells = shares.shape
        shares = F.pad(shares, (0, 0, 0, 0, 0, -length % SIDE)).unflatten(0, (-1, SIDE))
        is_read = shares.ne(0).flatten(1, 2).any(1).int()  # (n, cells)
        first, last = is_read.argmax(1), num_cells - 1 - is_read.flip(1).argmax(1)
        width = int((last - first).max()) + 1
        cells = first.clamp(max=num_cells - width)[:, None] + torch.arange(width, device=first.device)
        shares = shares.gather(3, cells[:, None, None].expand(*shares.shape[:3], width))
        return cls(length, num_cells, cells, shares)

    @property
    def missing(self) -> int:
        """Pixels that the last tile lacks."""
        return -self.length % SIDE


class Tiles:
    """The products of one size of map. Maps come as (B, C, height, width), and go in channels-last memory."""

    def __init__(self, rows: Axis, cols: Axis) -> None:
        self.rows, self.cols = rows, cols
        cells = rows.cells[:, None, :, None] * cols.num_cells + cols.cells[:, None]  # (n, m, U, V)
        self.cells = cells.flatten(1)
        self.window = rows.cells.shape[1] * cols.cells.shape[1]  # U*V

    def band(self, kernels: Tensor) -> Tensor:
        """(B, K*K, H, W) -> (n, B*m, T*T, U*V)."""
        of_rows, of_cols = (axis.shares.to(kernels) for axis in (self.rows, self.cols))
        kernels = kernels.unflatten(1, (of_rows.shape[2], of_cols.shape[2]))
        kernels = F.pad(kernels, (0, self.cols.missing, 0, self.rows.missing))
        kernels = kernels.unflatten(4, (-1, SIDE)).unflatten(3, (-1, SIDE))
        lines = torch.einsum("bijsytx,syiu->bjsytxu", kernels, of_rows)
        band = torch.einsum("bjsytxu,txjv->sbtyxuv", lines, of_cols)
        return band.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def kernels(self, band: Tensor) -> Tensor:
        """The transpose of `band`: (n, B*m, T*T, U*V) -> (B, K*K, H, W)."""
        of_rows, of_cols = (axis.shares.to(band) for axis in (self.rows, self.cols))
        windows = (of_rows.shape[3], of_cols.shape[3])
        band = band.unflatten(3, windows).unflatten(2, (SIDE, SIDE)).unflatten(1, (-1, len(of_cols)))
        lines = torch.einsum("sbtyxuv,txjv->bjsytxu", band, of_cols)
        kernels = torch.einsum("bjsytxu,syiu->bijsytx", lines, of_rows)
        kernels = kernels.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return kernels[:, :, : self.rows.length, : self.cols.length]

    def sum(self, x: Tensor, band: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, H, W)."""
        tiles = (len(x), len(self.cols.cells), SIDE, SIDE, x.shape[1])
        out = x.new_empty(len(x), len(band), SIDE, len(self.cols.cells), SIDE, x.shape[1])
        for windows, products, lines in zip(self._windows(x), band, out.unbind(1), strict=True):
            lines.copy_((products @ windows).view(tiles).transpose(1, 2))
        out = out.flatten(3, 4).flatten(1, 2)[:, : self.rows.length, : self.cols.length]
        return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def spread(self, y: Tensor, band: Tensor) -> Tensor:
        """The transpose of `sum`: y (B, C, H, W) -> (B, C, h, w)."""
        size = (len(y), self.rows.num_cells, self.cols.num_cells, y.shape[1])
        out = y.new_zeros(size).flatten(0, 2)
        for cells, products, pixels in zip(self._cells(y), band, self._pixels(y), strict=True):
            out.index_add_(0, cells, (products.transpose(1, 2) @ pixels).flatten(0, 1))
        return out.view(size).permute(0, 3, 1, 2)

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """Of every pixel and every cell that its tile reads: x (B, C, h, w), y (B, C, H, W) -> a band."""
        tiles = len(x) * len(self.cols.cells)
        band = x.new_empty(len(self.cells), tiles, SIDE**2, self.window)
        for windows, pixels, products in zip(self._windows(x), self._pixels(y), band, strict=True):
            torch.bmm(pixels, windows.transpose(1, 2), out=products)
        return band

    def _windows(self, x: Tensor) -> Iterator[Tensor]:
        """x (B, C, h, w) -> n of (B*m, U*V, C): what the tiles of a row read."""
        flat = x.permute(0, 2, 3, 1).flatten(0, 2)
        tiles = (len(x) * len(self.cols.cells), self.window, x.shape[1])
        return (flat.index_select(0, cells).view(tiles) for cells in self._cells(x))

    def _cells(self, x: Tensor) -> Iterator[Tensor]:
        """n of (B*m*U*V,): which of B*h*w cells the tiles of a row read, in all maps of a batch."""
        first = self.rows.num_cells * self.cols.num_cells * torch.arange(len(x), device=x.device)
        return ((first[:, None] + cells).flatten() for cells in self.cells.to(x.device))

    def _pixels(self, y: Tensor) -> Iterator[Tensor]:
        """y (B, C, H, W) -> n of (B*m, T*T, C): the tiles of a row."""
        for lines in y.permute(0, 2, 3, 1).split(SIDE, 1):
            lines = F.pad(lines, (0, 0, 0, self.cols.missing, 0, SIDE - lines.shape[1]))
            yield lines.unflatten(2, (-1, SIDE)).transpose(1, 2).reshape(-1, SIDE**2, y.shape[1])
