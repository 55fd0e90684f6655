"""A straightforward INF-LLaVA vision, the peer of the benchmark: what a reader of its released code would
write with torch.

An image is cut into local and global crops; the encoder sees them one by one and then the small image, 19
passes for three crops a side; one attention is called window by window in both passes of the enhancement.
Letters: B images, d width, g tokens per side of a crop, n crops per side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PeerAttention(nn.Module):
    """linears: of queries, keys, values and outputs."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linears = nn.ModuleList([nn.Linear(dim, dim) for _ in range(4)])
        self.ln = nn.LayerNorm(dim)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, g*g, d) each -> (B, g*g, d)."""
        q, k, v = (
            linear(x).view(len(x), -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
            for linear, x in zip(self.linears, (query, key, key), strict=False)
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(query.shape)
        return self.ln(self.linears[3](mixed) + query)


class PeerEnhancement(nn.Module):
    def __init__(self, dim: int, *, heads: int = 8, n: int = 3) -> None:
        super().__init__()
        self.n = n
        self.attention = PeerAttention(dim, heads)
        self.ffn_crop, self.ffn_stride = (
            nn.Sequential(nn.Linear(dim, dim // 16), nn.GELU(), nn.Linear(dim // 16, dim // 2))
            for _ in range(2)
        )
        self.ln_fuse = nn.LayerNorm(dim)

    def forward(self, local: list[Tensor], strided: list[Tensor]) -> Tensor:
        """n * n crops' tokens (B, g*g, d) each -> (B, g*g, d)."""
        side = math.isqrt(local[0].shape[1])
        maps = [self._joined([x.unflatten(1, (side, side)) for x in local], _block, side)]
        maps.append(self._joined([x.unflatten(1, (side, side)) for x in strided], _stride, side))
        crop_map, stride_map = maps
        of_strided = self._enhanced(stride_map, crop_map, _block, side)
        of_crops = self._enhanced(crop_map, stride_map, _stride, side)
        both = torch.cat([self.ffn_crop(of_crops), self.ffn_stride(of_strided)], -1)
        fused = self.ln_fuse(both + of_strided + of_crops).permute(0, 3, 1, 2)
        out = F.interpolate(fused.float(), (side, side), mode="bilinear", align_corners=False)
        return out.to(fused.dtype).flatten(2).transpose(1, 2)

    def _enhanced(self, queries: Tensor, keys: Tensor, cut: Cut, side: int) -> Tensor:
        windows = []
        for k in range(self.n**2):
            place = cut(*divmod(k, self.n), side, self.n)
            query, key = (x[:, *place].flatten(1, 2) for x in (queries, keys))
            windows.append(self.attention(query, key).unflatten(1, (side, side)))
        return self._joined(windows, cut, side)

    def _joined(self, crops: list[Tensor], cut: Cut, side: int) -> Tensor:
        """(B, g, g, d) each -> (B, n*g, n*g, d)."""
        batch, dim = crops[0].shape[0], crops[0].shape[-1]
        whole = crops[0].new_empty(batch, self.n * side, self.n * side, dim)
        for k, crop in enumerate(crops):
            whole[:, *cut(*divmod(k, self.n), side, self.n)] = crop
        return whole


Cut = Callable[[int, int, int, int], tuple[slice, slice]]


def _block(row: int, col: int, side: int, n: int) -> tuple[slice, slice]:
    return slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)


def _stride(row: int, col: int, side: int, n: int) -> tuple[slice, slice]:
    return slice(row, None, n), slice(col, None, n)


class PeerVision(nn.Module):
    """encode: (B, 3, side, side) -> tokens (B, g*g, d) of one crop."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        enhancement: PeerEnhancement,
        projector: nn.Module,
        side: int,
    ) -> None:
        super().__init__()
        self.encode, self.side = encode, side
        self.enhancement, self.projector = enhancement, projector

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> visual tokens (B, g*g, D)."""
        n, side = self.enhancement.n, self.side
        large, small = (
            F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False).to(image.dtype)
            for size in (n * side, side)
        )
        of_crops = []
        for cut in (_block, _stride):
            places = [cut(*divmod(k, n), side, n) for k in range(n**2)]
            of_crops.append([self.encode(large[:, :, *place]) for place in places])
        low = self.encode(small)
        return self.projector((low + self.enhancement(*of_crops)) / 2)
