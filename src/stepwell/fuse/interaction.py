"""Branches of a pyramid talk to each other: cross-attention between neighbours, both ways, through gates that
start at zero.

PIIP, arXiv 2501.07783, equations 1 and 2 and Table XVII (directions). A *message* goes from one branch to
another: the target's tokens ask, the source's tokens answer. Messages of one *unit* are sent at the same
time; units follow each other. Class tokens stay with their branch.
Letters: B batch, d width of the target, d_f width of what it reads, N tokens of the target, M of the source,
(H, W) the target's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.attention import attention
from stepwell.layers.deformable import DeformableAttention
from stepwell.layers.depthwise import DepthwiseConv
from stepwell.layers.drop_path import DropPath
from stepwell.layers.linear import Linear
from stepwell.ops.parts import in_parts
from stepwell.ops.precision import at_least_single
from stepwell.ops.rearrange import map_to_tokens, tokens_to_map
from stepwell.ops.resize import cell_centres
from stepwell.structures import Size, TokenMap

__all__ = [
    "DIRECTIONS",
    "ConvFfn",
    "DeformableCrossAttention",
    "Direction",
    "Injector",
    "Interaction",
    "InteractionConfig",
    "InteractionUnit",
    "Message",
    "RegularCrossAttention",
    "Schedule",
    "reference_points",
]

Direction = tuple[int, int]
"""(source, target): positions in the list of branches, largest network first."""
Schedule = Sequence[Sequence[Direction]]
"""Units in order; the directions inside a unit are simultaneous, and reach every branch at most once."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InteractionConfig:
    """PIIP, section III-C; the defaults are those of every released configuration.

    ratio: width inside deformable attention by the width of the query. ffn_ratio: the same for the hidden
    layer of the convolutional FFN; None leaves the FFN out. project: linear maps between the widths of two
    branches. norm: False makes all norms identities. drop_path: of the FFN. directions: see `DIRECTIONS`.
    """

    attention: Literal["deformable", "regular"] = "deformable"
    num_heads: Annotated[int, Field(gt=0)] = 16
    num_points: Annotated[int, Field(gt=0)] = 4
    ratio: Annotated[float, Field(gt=0)] = 0.5
    ffn_ratio: Annotated[float, Field(gt=0)] | None = 0.25
    project: bool = True
    norm: bool = True
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.4
    directions: Literal["adjacent", "alternating", "cycle_down", "cycle_up", "all_pairs", "none"] = "adjacent"


class Interaction(nn.Module):
    """Units one after the other, each reading what the one before has written.

    dims: width of every branch. index: which interaction of the pyramid this is, from 0 on.
    """

    def __init__(self, dims: Sequence[int], config: InteractionConfig, *, index: int = 0) -> None:
        super().__init__()
        schedule = DIRECTIONS[config.directions](len(dims), index)
        self.units = nn.ModuleList(InteractionUnit(dims, unit, config) for unit in schedule)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the official code: truncated normal of std 0.02, fan-out normal convolutions, gates 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):  # depthwise, so that the fan-out is the kernel's area
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():  # after the linear layers inside them
            if isinstance(module, DeformableCrossAttention):
                module.reset_parameters()

    def forward(self, states: Sequence[TokenMap], cut: Tensor | None = None) -> list[TokenMap]:
        """One state per branch -> one state per branch. cut (B, 4): where the last branch looks in what the
        others see, a box in fractions of that; None: they see the same.
        """
        updated = list(states)
        for unit in self.units:
            updated = unit(updated, cut)
        return updated


class InteractionUnit(nn.Module):
    """Messages sent at the same time: each reads what the branches held before any of them arrived."""

    def __init__(
        self, dims: Sequence[int], directions: Sequence[Direction], config: InteractionConfig
    ) -> None:
        super().__init__()
        self.targets = [target for _, target in directions]
        self.messages = nn.ModuleList(Message(direction, dims, config) for direction in directions)

    def forward(self, states: Sequence[TokenMap], cut: Tensor | None = None) -> list[TokenMap]:
        """As `Interaction`'s."""
        updated = list(states)
        for target, message in zip(self.targets, self.messages, strict=True):
            updated[target] = message(states, cut)
        return updated


class Message(nn.Module):
    """What branch `source` tells branch `target`: its tokens, brought to the target's width and injected."""

    def __init__(self, direction: Direction, dims: Sequence[int], config: InteractionConfig) -> None:
        super().__init__()
        self.source, self.target = direction
        source_dim, dim = dims[self.source], dims[self.target]
        self.project = Linear(source_dim, dim) if config.project else nn.Identity()
        self.injector = Injector(dim, dim if config.project else source_dim, config)

    def forward(self, states: Sequence[TokenMap], cut: Tensor | None = None) -> TokenMap:
        """The states of all branches -> the target's new state. cut: as `Interaction`'s."""
        source, target = states[self.source], states[self.target]
        values = in_parts(lambda tokens: self.injector.values_of(self.project(tokens)), source.tokens)
        seen = None
        if cut is not None and len(states) - 1 in (self.source, self.target):
            seen = cut if self.target == len(states) - 1 else _from_within(cut)
        return target._replace(tokens=self.injector(target.tokens, target.size, values, source.size, seen))

    def extra_repr(self) -> str:
        return f"{self.source} -> {self.target}"


class Injector(nn.Module):
    """Equations 1 and 2: tokens read features through attention, then pass an FFN, each behind a gate.

    `values_of` treats every token of the features by itself, so whoever holds many can call it on parts.
    """

    def __init__(self, dim: int, feature_dim: int, config: InteractionConfig) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6) if config.norm else nn.Identity
        self.attn: DeformableCrossAttention | RegularCrossAttention
        if config.attention == "deformable":
            self.attn = DeformableCrossAttention(
                dim,
                feature_dim,
                num_heads=config.num_heads,
                num_points=config.num_points,
                ratio=config.ratio,
            )
        else:
            self.attn = RegularCrossAttention(dim, feature_dim, num_heads=config.num_heads)
        self.query_norm = norm(dim)
        self.feature_norm = norm(feature_dim)
        self.gate = nn.Parameter(torch.zeros(dim))
        self.ffn = None
        if config.ffn_ratio is not None:
            self.ffn = ConvFfn(dim, hidden_dim=int(dim * config.ffn_ratio))
            self.ffn_norm = norm(dim)
            self.ffn_gate = nn.Parameter(torch.zeros(dim))
            self.drop_path = DropPath(config.drop_path)

    def reset_parameters(self) -> None:
        """Closed gates: the branches begin as they were apart."""
        nn.init.zeros_(self.gate)
        if self.ffn is not None:
            nn.init.zeros_(self.ffn_gate)

    def values_of(self, features: Tensor) -> Tensor:
        """features (B, M, d_f) -> what the attention reads of them, (B, M, ...)."""
        values: Tensor = self.attn.values_of(self.feature_norm(features))
        return values

    def forward(
        self, x: Tensor, size: Size, values: Tensor, feature_size: Size, box: Tensor | None = None
    ) -> Tensor:
        """x (B, N, d) on grid `size`, values of features on grid `feature_size` -> (B, N, d). box: as of
        `reference_points`.
        """
        x = x + self.gate * self.attn(self.query_norm(x), size, values, feature_size, box)
        if self.ffn is not None:
            x = x + self.drop_path(self.ffn_gate * self.ffn(self.ffn_norm(x), size))
        return x


class DeformableCrossAttention(DeformableAttention):
    """Every query reads `num_points` points per head, at offsets from its place in cells of the other map.

    The width inside is int(dim * ratio), a multiple of `num_heads`.
    """

    def __init__(
        self, dim: int, feature_dim: int, *, num_heads: int, num_points: int = 4, ratio: float = 1.0
    ) -> None:
        inner = int(dim * ratio)
        if inner < 1 or inner % num_heads:
            raise ValueError(
                f"deformable attention of width {dim} with ratio {ratio} has {inner} channels inside, "
                f"which do not divide into {num_heads} heads; change ratio or num_heads"
            )
        super().__init__(dim, feature_dim, inner, num_heads=num_heads, num_points=num_points)

    def forward(
        self, query: Tensor, size: Size, values: Tensor, feature_size: Size, box: Tensor | None = None
    ) -> Tensor:
        """query (B, N, d) on grid `size`, values of features on grid `feature_size` -> (B, N, d). box: as of
        `reference_points`.
        """
        return self.read(query, values, [feature_size], _centres(query, size, feature_size, box))

    def places(
        self, query: Tensor, size: Size, feature_size: Size, box: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the same queries read, and how much of each point: columns, rows and weights, as `points`
        gives them.
        """
        return self.points(query, _centres(query, size, feature_size, box))


def _centres(query: Tensor, size: Size, other: Size, box: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference_points`, as they broadcast to the points of every query."""
    exact = at_least_single(query.dtype)
    x, y = reference_points(size, other, box, device=query.device, dtype=exact)
    per_query = (*x.shape, 1, 1, 1)
    return x.view(per_query), y.view(per_query)


def reference_points(
    size: Size,
    other: Size,
    box: Tensor | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Where the cell centres of a grid `size` lie on the grid `other`: columns and rows, (H*W,) each, counted
    in cells of `other` from the centre of its first.

    box (B, 4): the first grid lies there in the other, or reaches beyond it, in fractions of its sides; then
    (B, H*W) each. None: both show the same.
    """
    if box is not None:
        left, top, right, bottom = box.to(dtype).unbind(1)
        x, y = (
            cell_centres(n, first, last) * m - 0.5
            for n, m, first, last in zip(size[::-1], other[::-1], (left, top), (right, bottom), strict=True)
        )
        shape = (-1, *size)
        return x[:, None].expand(shape).flatten(1), y[:, :, None].expand(shape).flatten(1)
    y, x = (
        (torch.arange(n, device=device, dtype=dtype) + 0.5) / n * m - 0.5
        for n, m in zip(size, other, strict=True)
    )
    return x.expand(size).flatten(), y[:, None].expand(size).flatten()


def _from_within(box: Tensor) -> Tensor:
    """Where a box (B, 4) of a frame lies in it -> where the frame lies in the box, both in fractions."""
    left, top, right, bottom = box.unbind(1)
    width, height = right - left, bottom - top
    return torch.stack([-left / width, -top / height, (1 - left) / width, (1 - top) / height], 1)


class RegularCrossAttention(nn.Module):
    """Every query attends to every token of the other branch."""

    def __init__(self, dim: int, feature_dim: int, *, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.query = Linear(dim, dim, bias=False)
        self.key = Linear(feature_dim, dim, bias=False)
        self.value = Linear(feature_dim, dim, bias=False)
        self.out = Linear(dim, dim)

    def values_of(self, features: Tensor) -> Tensor:
        """features (B, M, d_f) -> keys and values, (B, M, 2 d)."""
        return torch.cat([self.key(features), self.value(features)], -1)

    def forward(
        self, query: Tensor, size: Size, values: Tensor, feature_size: Size, box: Tensor | None = None
    ) -> Tensor:
        """query (B, N, d), keys and values of features -> (B, N, d); nobody asks where they lie."""
        q, k, v = (
            tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (self.query(query), *values.chunk(2, dim=-1))
        )
        answer: Tensor = self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return answer


class ConvFfn(nn.Module):
    """A small FFN with a depthwise 3x3 convolution on the grid between its two layers."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.conv = DepthwiseConv(hidden_dim, 3)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, H*W, d) -> (B, H*W, d), size = (H, W)."""
        x = self.conv(tokens_to_map(self.fc1(x), size))
        out: Tensor = self.fc2(F.gelu(map_to_tokens(x)))
        return out


def _adjacent(num_branches: int, index: int) -> Schedule:
    """Type 4, the default: neighbours both ways, finest pair first: the largest network hears of all."""
    return [_both_ways(a, a + 1) for a in reversed(range(num_branches - 1))]


def _alternating(num_branches: int, index: int) -> Schedule:
    """Type 1: neighbours, from the largest network to the smallest at even interactions, back at odd ones."""
    chain = range(num_branches)
    return [[step] for step in pairwise(chain if index % 2 == 0 else reversed(chain))]


def _cycle_down(num_branches: int, index: int) -> Schedule:
    """Type 2: largest network -> ... -> smallest -> largest."""
    return _cycle(list(range(num_branches)))


def _cycle_up(num_branches: int, index: int) -> Schedule:
    """Type 3: smallest network -> ... -> largest -> smallest."""
    return _cycle(list(reversed(range(num_branches))))


def _all_pairs(num_branches: int, index: int) -> Schedule:
    """Type 5: every pair both ways, finest first."""
    return [_both_ways(a, b) for b in reversed(range(num_branches)) for a in reversed(range(b))]


def _both_ways(a: int, b: int) -> list[Direction]:
    return [(b, a), (a, b)]


def _cycle(ring: list[int]) -> Schedule:
    return [[step] for step in pairwise([*ring, ring[0]])] if len(ring) > 1 else []


DIRECTIONS: dict[str, Callable[[int, int], Schedule]] = {
    "adjacent": _adjacent,
    "alternating": _alternating,
    "cycle_down": _cycle_down,
    "cycle_up": _cycle_up,
    "all_pairs": _all_pairs,
    "none": lambda count, index: [],
}
"""Table XVII: (number of branches, index of the interaction) -> schedule. The paper draws the types without
naming them; all but "adjacent" are inferred from their printed cost. "none": branches meet where they are
merged (Fig. 1c).
"""
