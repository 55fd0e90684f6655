"""Maps and logits at another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = ["cell_centres", "cut_from_map", "put_on_map", "resize_map"]


def resize_map(x: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear by target size, corners not aligned, in fp32 at least."""
    if x.shape[-2:] == size:
        return x
    exact = x.to(at_least_single(x.dtype))
    return F.interpolate(exact, size, mode="bilinear", align_corners=False).to(x.dtype)


def cell_centres(count: int, first: Tensor, last: Tensor) -> Tensor:
    """first, last (B,) -> (B, count): the centres of as many equal cells between the two."""
    steps = (torch.arange(count, device=first.device, dtype=first.dtype) + 0.5) / count
    return first[:, None] + steps * (last - first)[:, None]


def cut_from_map(x: Tensor, size: Size, boxes: Tensor) -> Tensor:
    """(B, C, h, w), boxes (B, 4) in fractions of its sides -> (B, C, H, W): what lies in each box.

    Bilinear as `resize_map`, which does the same for the box (0, 0, 1, 1); beyond the outermost cells'
    centres there is what these hold.
    """
    exact = x.to(at_least_single(x.dtype))
    left, top, right, bottom = boxes.to(exact).unbind(1)
    cols, rows = cell_centres(size[1], left, right), cell_centres(size[0], top, bottom)
    grid = torch.stack([cols[:, None].expand(-1, size[0], -1), rows[:, :, None].expand(-1, -1, size[1])], -1)
    cut = F.grid_sample(exact, 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return cut.to(x.dtype)


def put_on_map(x: Tensor, size: Size, boxes: Tensor) -> Tensor:
    """(B, C, h, w), boxes (B, 4) in fractions of a map -> that map, (B, C, H, W): x in the box, elsewhere
    zero.

    A cell holds the mean, by area, of what lies in it.
    """
    exact = x.to(at_least_single(x.dtype))
    left, top, right, bottom = boxes.to(exact).unbind(1)
    rows = _overlaps(size[0], x.shape[-2], top, bottom)
    cols = _overlaps(size[1], x.shape[-1], left, right)
    return torch.einsum("bIi,bcij,bJj->bcIJ", rows, exact, cols).to(x.dtype)


def _overlaps(count: int, parts: int, first: Tensor, last: Tensor) -> Tensor:
    """(B, count, parts): the share of each of `count` equal cells between 0 and 1 that lies in each of
    `parts` equal cells between first and last (B,).
    """
    cells = torch.arange(count + 1, device=first.device, dtype=first.dtype)[None, :, None] / count
    steps = torch.arange(parts + 1, device=first.device, dtype=first.dtype) / parts
    edges = (first[:, None] + steps * (last - first)[:, None])[:, None]
    shared = torch.minimum(cells[:, 1:], edges[..., 1:]) - torch.maximum(cells[:, :-1], edges[..., :-1])
    return shared.clamp(min=0) * count
