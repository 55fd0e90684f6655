"""Features as colours: the first principal components of the cells of maps.

LLaVA-UHD v2, arXiv 2412.13871, figures 11 and 12. Letters: C width, (h, w) the grid of a map, K components, S
cells of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Components", "colours", "principal_components"]

CLIPPED = 0.01
"""Share of cells at either end whose component is cut off where it becomes a colour: a few far ones would
leave all others one grey.
"""


class Components(NamedTuple):
    """Of maps of one width, taken together."""

    parts: tuple[Tensor, ...]  # of each map (K, h, w)
    axes: Tensor  # (K, C), of length 1; the largest number of each is positive
    shares: Tensor  # (K,), of the variance of all cells


def principal_components(maps: Sequence[Tensor], count: int = 3) -> Components:
    """maps (C, h, w) -> their first components, or as many as there are channels or cells.

    Raises ValueError for maps of unequal width, and for none.
    """
    if len({map.shape[0] for map in maps}) != 1 or any(map.ndim != 3 for map in maps):
        raise ValueError(
            f"components are of maps (C, h, w) of one width, got {[tuple(map.shape) for map in maps]}"
        )
    cells = torch.cat([map.detach().double().cpu().flatten(1) for map in maps], 1).T  # (S, C)
    cells = cells - cells.mean(0)
    # Of the smaller of the two products: cells are many, or channels are.
    if cells.shape[0] >= cells.shape[1]:
        variances, vectors = torch.linalg.eigh(cells.T @ cells)
        axes = vectors.flip(1).T[:count]
    else:
        variances, vectors = torch.linalg.eigh(cells @ cells.T)
        axes = vectors.flip(1).T[:count] @ cells
        axes = axes / axes.norm(dim=1, keepdim=True).clamp(min=torch.finfo(axes.dtype).tiny)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = torch.where(largest < 0, -axes, axes)
    total = cells.square().sum().clamp(min=torch.finfo(cells.dtype).tiny)
    shares = variances.flip(0)[:count].clamp(min=0) / total
    pieces = (axes @ cells.T).split([map[0].numel() for map in maps], 1)
    parts = tuple(piece.unflatten(1, map.shape[1:]).float() for piece, map in zip(pieces, maps, strict=True))
    return Components(parts, axes.float(), shares.float())


def colours(components: Components) -> tuple[Tensor, ...]:
    """Of each map (h, w, 3), in 0..1: a component a colour, on one scale for all maps. A component that there
    is not is black.
    """
    everything = torch.cat([part.flatten(1) for part in components.parts], 1)
    ordered = everything.sort(1).values
    cut = int(CLIPPED * ordered.shape[1])
    low, high = ordered[:, cut], ordered[:, -1 - cut]
    room = (high - low).clamp(min=1e-12)
    pictures = []
    for part in components.parts:
        scaled = ((part - low[:, None, None]) / room[:, None, None]).clamp(0, 1)
        black = scaled.new_zeros(max(0, 3 - len(scaled)), *scaled.shape[1:])
        pictures.append(torch.cat([scaled[:3], black]).movedim(0, -1))
    return tuple(pictures)
