"""Local and global crops of an image that enhance each other.

INF-LLaVA, arXiv 2407.16198, section 4.3. The features of local crops lie on the image's fine grid block by
block, those of global crops cell by cell; every cell asks the other perspective within one window, and both
answers become one map of the size of a crop's. Where the paper and its released code differ, both are here
and the defaults are the code's.

A cell's *phase* is its place in the strides of the grid: the global crop that it belongs to. Everything is
done phase by phase, (B, P, h, w, C), for the reduction at the end takes the phases of a place together: it
averages all of them, or those that a bilinear resize reads, and then no other is worked out.
Letters: B images, (R, K) the grid of crops, (h, w) the cells of a crop, C width, P phases, n and m cells of a
window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.attention import attention
from stepwell.layers.conv import Conv2d
from stepwell.layers.linear import Linear
from stepwell.ops.choose import choose
from stepwell.ops.crops import Phases, merge_blocks, merge_strides, middle, split_blocks, split_strides
from stepwell.ops.precision import at_least_single
from stepwell.structures import Size

__all__ = [
    "PAPER_ENHANCEMENT",
    "BottleneckFusion",
    "CellwiseFusion",
    "ConvFusion",
    "DualEnhancement",
    "EnhancementConfig",
    "LinearFusion",
    "WeightedAddition",
    "WindowCrossAttention",
]
MOST_WINDOWS = 4


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EnhancementConfig:
    """perspectives: whose crops are encoded (Table 6). enhance: whose cells ask the other perspective, "none"
    takes the maps as they are (Tables 4 and 6). windows: a perspective asks in windows of its "own" kind,
    which is strides for global cells and blocks for local ones, as the paper's equations say, or in those of
    the "other", as the code does.

    num_heads, shared (one attention for both perspectives), bias, out_projection, residual, norm: of the
    attention. fusion: of two maps (Table 5); a map that is alone stays as it is. reduce: to the size of a
    crop; "bilinear" reads the middle of a place alone, "none" keeps every cell.
    """

    perspectives: Literal["both", "local", "global"] = "both"
    enhance: Literal["both", "local", "global", "none"] = "both"
    windows: Literal["other", "own"] = "other"
    num_heads: Annotated[int, Field(ge=1)] = 8
    shared: bool = True
    bias: bool = True
    out_projection: bool = True
    residual: bool = True
    norm: bool = True
    fusion: Literal[
        "bottleneck", "linear_concat", "conv3x3", "multiplication", "weighted_addition", "max", "addition"
    ] = "bottleneck"
    reduce: Literal["bilinear", "average", "max", "none"] = "bilinear"

    def __post_init__(self) -> None:
        if self.perspectives != "both" and self.enhance != "none":
            raise ValueError(
                f"perspectives {self.perspectives!r} leave nobody to ask: set enhance 'none', or "
                "perspectives 'both'"
            )

    @property
    def num_maps(self) -> int:
        """That are to be fused."""
        return 2 if self.perspectives == "both" and self.enhance in ("both", "none") else 1

    @property
    def reads_middle(self) -> bool:
        """Whether only the phases in the middle reach the result (`ops.crops.middle`)."""
        sees_neighbours = self.num_maps == 2 and self.fusion == "conv3x3"
        return self.reduce == "bilinear" and not sees_neighbours

    @property
    def global_crops(self) -> Literal["all", "middle", "none"]:
        """Those without which the result would be another. Of local crops that is always all or none."""
        if self.perspectives == "local":
            return "none"
        asked_in_blocks = self.windows == "own" and self.enhance in ("both", "local")
        return "middle" if self.reads_middle and not asked_in_blocks else "all"


PAPER_ENHANCEMENT = EnhancementConfig(
    windows="own",
    num_heads=1,
    shared=False,
    bias=False,
    out_projection=False,
    residual=False,
    norm=False,
    fusion="linear_concat",
    reduce="average",
)
"""Equations 18 to 27 as they are printed."""


class WindowCrossAttention(nn.Module):
    """Equations 20 and 25: cells of a window ask the cells of another perspective in the same window."""

    def __init__(
        self, dim: int, *, num_heads: int, bias: bool, out_projection: bool, residual: bool, norm: bool
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"the encoder's width {dim} is not a multiple of {num_heads} heads; "
                "change enhancement.num_heads"
            )
        self.num_heads, self.residual = num_heads, residual
        self.query, self.key, self.value = (Linear(dim, dim, bias=bias) for _ in range(3))
        self.out = Linear(dim, dim, bias=bias) if out_projection else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=1e-5) if norm else nn.Identity()

    def forward(self, asking: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """asking (B, n, C), keys and values (B, m, C) -> (B, n, C)."""
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, asking), (self.key, keys), (self.value, values))
        )
        mixed = self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = self.norm(mixed + asking if self.residual else mixed)
        return out


class DualEnhancement(nn.Module):
    """Features of local and of global crops, width `dim`, -> one map."""

    def __init__(self, dim: int, config: EnhancementConfig) -> None:
        super().__init__()
        self.config = config
        number = {"none": 0, "both": 1 if config.shared else 2}.get(config.enhance, 1)
        self.attentions = nn.ModuleList(
            WindowCrossAttention(
                dim,
                num_heads=config.num_heads,
                bias=config.bias,
                out_projection=config.out_projection,
                residual=config.residual,
                norm=config.norm,
            )
            for _ in range(number)
        )
        self.fusion = _FUSIONS[config.fusion](dim) if config.num_maps == 2 else None

    def forward(self, local: Tensor | None, strided: Tensor | None, grid: Size) -> Tensor:
        """local (B, R*K, h, w, C): features of the local crops. strided (B, P, h, w, C): of the global ones,
        of all or, where no others are needed, of those in the middle. A perspective that is not read may be
        None. -> (B, h, w, C), or (B, R*h, K*w, C) for reduce "none".

        Raises ValueError for another number of crops.
        """
        maps = self.enhanced(local, strided, grid, self._phases(strided, grid))
        fused = maps[0] if self.fusion is None else self.fusion(*maps, grid)
        return self._reduced(fused, grid)

    def enhanced(
        self, local: Tensor | None, strided: Tensor | None, grid: Size, phases: Phases
    ) -> list[Tensor]:
        """The maps that are fused, (B, P, h, w, C) with the given phases, the global one first."""
        own = {}
        if strided is not None and self.config.perspectives != "local":
            own["global"] = _chosen(strided, phases, grid)
        if local is not None and self.config.perspectives != "global":
            own["local"] = split_strides(merge_blocks(local, grid), grid, phases)
        if self.config.enhance == "none":
            return list(own.values())
        assert local is not None
        assert strided is not None
        asking = [name for name in own if self.config.enhance in ("both", name)]
        maps = []
        for name, attend in zip(asking, (self.attentions[0], self.attentions[-1]), strict=False):
            other = "local" if name == "global" else "global"
            if (name == "local") == (self.config.windows == "own"):
                blocks = local if other == "local" else split_blocks(merge_strides(strided, grid), grid)
                maps.append(_ask_in_blocks(attend, own[name], blocks, phases, grid))
            else:
                maps.append(_ask(attend, own[name], own[other]))
        return maps

    def _phases(self, strided: Tensor | None, grid: Size) -> Phases:
        """Those that are worked out: the middle where that is enough, and on the fast path, or there is no
        more.
        """
        every, few = (range(grid[0]), range(grid[1])), (middle(grid[0]), middle(grid[1]))
        number = None if strided is None else strided.shape[1]
        if number in (None, _count(every)):
            return few if self.config.reads_middle and choose() else every
        if number != _count(few) or self.config.global_crops != "middle":
            raise ValueError(f"{number} global crops are not those of a grid of {grid[0]}x{grid[1]}")
        return few

    def _reduced(self, fused: Tensor, grid: Size) -> Tensor:
        """(B, P, h, w, C) -> (B, h, w, C), or every cell."""
        how = self.config.reduce
        if how == "none":
            return merge_strides(fused, grid)
        if how == "max":
            return fused.amax(1)
        if how == "bilinear" and fused.shape[1] == grid[0] * grid[1] and not choose():
            whole = merge_strides(fused, grid).movedim(-1, 1).to(at_least_single(fused.dtype))
            small = F.interpolate(whole, fused.shape[2:4], mode="bilinear", align_corners=False)
            return small.movedim(1, -1).to(fused.dtype)
        if how == "bilinear" and not self.config.reads_middle:
            fused = _chosen(fused, (middle(grid[0]), middle(grid[1])), grid)
        return fused.mean(1)  # which sums in single precision


def _ask(attend: nn.Module, asking: Tensor, cells: Tensor) -> Tensor:
    """Window by window: (B, N, ..., C) and (B, N, ..., C) -> as `asking`. Without a gradient, keys and values
    of a few windows at a time are held.
    """
    windows = [x.flatten(0, 1).flatten(1, -2) for x in (asking, cells)]
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    number = len(windows[0]) if whole else MOST_WINDOWS
    parts = zip(*(x.split(number) for x in windows), strict=True)
    return torch.cat([attend(asked, read, read) for asked, read in parts]).view_as(asking)


def _ask_in_blocks(attend: nn.Module, asking: Tensor, blocks: Tensor, phases: Phases, grid: Size) -> Tensor:
    """asking (B, P, h, w, C) in the windows of blocks (B, R*K, h, w, C) -> as `asking`."""
    (rows, cols), (height, width) = grid, asking.shape[2:4]
    if height % rows or width % cols:  # phases lie unequally in the blocks: all are asked, and some are kept
        every = asking.new_zeros(len(asking), *grid, *asking.shape[2:])
        every[:, phases[0].start : phases[0].stop, phases[1].start : phases[1].stop] = asking.unflatten(
            1, (len(phases[0]), len(phases[1]))
        )
        whole = _ask(attend, split_blocks(merge_strides(every.flatten(1, 2), grid), grid), blocks)
        return split_strides(merge_blocks(whole, grid), grid, phases)
    windows = split_blocks(asking.flatten(0, 1), grid).unflatten(0, asking.shape[:2]).transpose(1, 2)
    mixed = _ask(attend, windows, blocks).transpose(1, 2)
    return merge_blocks(mixed.flatten(0, 1), grid).view_as(asking)


def _chosen(x: Tensor, phases: Phases, grid: Size) -> Tensor:
    """Of x (B, N, ...), with the phases of the whole grid or with these alone already, these."""
    if x.shape[1] == _count(phases):
        return x
    rows, cols = phases
    whole: Tensor = x.unflatten(1, grid)
    return whole[:, rows.start : rows.stop, cols.start : cols.stop].flatten(1, 2)


def _count(phases: Phases) -> int:
    return len(phases[0]) * len(phases[1])


def _half(dim: int) -> int:
    if dim % 2:
        raise ValueError(f"the encoder's width {dim} has no half for each map; change enhancement.fusion")
    return dim // 2


class BottleneckFusion(nn.Module):
    """As the code fuses: a bottleneck of each map, half of the width, beside each other, and both maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half, hidden_dim = _half(dim), max(dim // 16, 1)
        self.of_local, self.of_global = (
            nn.Sequential(Linear(dim, hidden_dim), nn.GELU(), Linear(hidden_dim, half)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, of_global: Tensor, of_local: Tensor, grid: Size) -> Tensor:
        """(B, P, h, w, C) each -> the same."""
        both = torch.cat([self.of_local(of_local), self.of_global(of_global)], -1)
        out: Tensor = self.norm(both + of_global + of_local)
        return out


class LinearFusion(nn.Module):
    """Equation 27: half of the width from each map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_global, self.of_local = (Linear(dim, _half(dim), bias=False) for _ in range(2))

    def forward(self, of_global: Tensor, of_local: Tensor, grid: Size) -> Tensor:
        """As `BottleneckFusion`."""
        return torch.cat([self.of_global(of_global), self.of_local(of_local)], -1)


class ConvFusion(nn.Module):
    """A 3x3 convolution of both maps on the fine grid, with all phases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(2 * dim, dim, 3, padding=1)

    def forward(self, of_global: Tensor, of_local: Tensor, grid: Size) -> Tensor:
        """As `BottleneckFusion`."""
        whole = merge_strides(torch.cat([of_global, of_local], -1), grid).movedim(-1, 1)
        return split_strides(self.conv(whole).movedim(1, -1), grid)


class WeightedAddition(nn.Module):
    """a * global + (1 - a) * local; a is learned and starts at a half."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(1))  # FSDP shards no scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.share, 0.5)

    def forward(self, of_global: Tensor, of_local: Tensor, grid: Size) -> Tensor:
        """As `BottleneckFusion`."""
        return self.share * of_global + (1 - self.share) * of_local


class CellwiseFusion(nn.Module):
    """Two maps cell by cell, with nothing to learn."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.run = run

    def forward(self, of_global: Tensor, of_local: Tensor, grid: Size) -> Tensor:
        """As `BottleneckFusion`."""
        return self.run(of_global, of_local)


_FUSIONS: dict[str, Callable[[int], nn.Module]] = {
    "bottleneck": BottleneckFusion,
    "linear_concat": LinearFusion,
    "conv3x3": ConvFusion,
    "multiplication": partial(CellwiseFusion, torch.mul),
    "weighted_addition": WeightedAddition,
    "max": partial(CellwiseFusion, torch.maximum),
    "addition": partial(CellwiseFusion, torch.add),
}
