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
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepwell.layers.attention import attention
from stepwell.layers.drop_path import DropPath
from stepwell.layers.mlp import gelu
from stepwell.ops.deform_attn import deform_attn
from stepwell.ops.parts import in_parts
from stepwell.ops.rearrange import map_to_tokens, tokens_to_map
from stepwell.structures import Size, TokenMap

__all__ = [
    "DIRECTIONS",
    "AttentionKind",
    "ConvFfn",
    "DeformableCrossAttention",
    "Direction",
    "Injector",
    "Interaction",
    "InteractionUnit",
    "Message",
    "RegularCrossAttention",
    "Schedule",
    "adjacent",
    "all_pairs",
    "alternating",
    "cycle_down",
    "cycle_up",
    "places_on",
]

AttentionKind = Literal["deformable", "regular"]
Direction = tuple[int, int]
"""(source, target): positions in the list of branches."""
Schedule = Sequence[Sequence[Direction]]
"""Units in order; the directions inside a unit are simultaneous."""
Prepare = Callable[[Tensor], Tensor]
"""What becomes of the tokens (B, M, C) of another branch, each by itself, before they are read."""


def _as_is(tokens: Tensor) -> Tensor:
    return tokens


def places_on(
    size: Size, other: Size, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Where the cell centres of a grid `size` lie on the grid `other`: columns and rows, (H*W,) each, counted
    in cells of `other` from the centre of its first."""
    y, x = (
        (torch.arange(n, device=device, dtype=dtype) + 0.5) / n * m - 0.5
        for n, m in zip(size, other, strict=True)
    )
    return x.expand(size).flatten(), y[:, None].expand(size).flatten()


class DeformableCrossAttention(nn.Module):
    """Every query reads `num_points` places per head, at offsets that it predicts in cells of the other map.

    The width inside is int(dim * ratio), a multiple of `num_heads`.
    """

    def __init__(
        self, dim: int, feature_dim: int, *, num_heads: int, num_points: int = 4, ratio: float = 1.0
    ) -> None:
        super().__init__()
        inner = int(dim * ratio)
        if inner < 1 or inner % num_heads:
            raise ValueError(
                f"deformable attention of width {dim} with ratio {ratio} has {inner} channels inside, "
                f"which do not divide into {num_heads} heads; change ratio or num_heads"
            )
        self.num_heads = num_heads
        self.num_points = num_points
        self.value = nn.Linear(feature_dim, inner)
        self.offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.weights = nn.Linear(dim, num_heads * num_points)
        self.out = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head h starts out looking in direction 2 pi h / num_heads, its k-th point k + 1 cells away."""
        turn = torch.arange(self.num_heads, device=self.offsets.bias.device) * (2 * math.pi / self.num_heads)
        ray = torch.stack([turn.cos(), turn.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # one cell away along the longer axis
        steps = torch.arange(1, self.num_points + 1, device=ray.device)
        with torch.no_grad():
            self.offsets.bias.copy_((ray[:, None] * steps[:, None]).flatten())
        for zero in (
            self.offsets.weight,
            self.weights.weight,
            self.weights.bias,
            self.value.bias,
            self.out.bias,
        ):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(
        self, query: Tensor, size: Size, features: Tensor, feature_size: Size, *, prepare: Prepare = _as_is
    ) -> Tensor:
        """query (B, N, d) on grid `size`, features (B, M, d_f) on grid `feature_size` -> (B, N, d).

        prepare: done to every token of `features` before it is read.
        """
        exact = torch.promote_types(query.dtype, torch.float32)  # places are lost, and softmax tails, in half
        heads = (self.num_heads, self.num_points)
        value = in_parts(lambda tokens: self.value(prepare(tokens)), features)
        value = value.unflatten(2, (self.num_heads, -1))
        offsets = self.offsets(query).unflatten(2, (*heads, 2)).to(exact)
        # The softmax is over the points; along an axis as short as theirs torch is ten times slower.
        weights = self.weights(query).unflatten(2, heads).transpose(2, 3).softmax(2, dtype=exact)
        x, y = places_on(size, feature_size, device=query.device, dtype=exact)
        answer: Tensor = self.out(
            deform_attn(
                value,
                feature_size,
                x[:, None, None] + offsets[..., 0],
                y[:, None, None] + offsets[..., 1],
                weights.transpose(2, 3),
            )
        )
        return answer


class RegularCrossAttention(nn.Module):
    """Every query attends to every token of the other branch."""

    def __init__(self, dim: int, feature_dim: int, *, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(feature_dim, dim, bias=False)
        self.value = nn.Linear(feature_dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, query: Tensor, size: Size, features: Tensor, feature_size: Size, *, prepare: Prepare = _as_is
    ) -> Tensor:
        """query (B, N, d), features (B, M, d_f) -> (B, N, d); the grids are not looked at."""
        features = prepare(features)
        q, k, v = (
            tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (self.query(query), self.key(features), self.value(features))
        )
        answer: Tensor = self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return answer


class ConvFfn(nn.Module):
    """A small FFN with a depthwise 3x3 convolution on the grid between its two layers."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        """(B, H*W, d) -> (B, H*W, d), size = (H, W)."""
        x = self.conv(tokens_to_map(self.fc1(tokens), size))
        out: Tensor = self.fc2(gelu(map_to_tokens(x)))
        return out


class Injector(nn.Module):
    """x += gate * attention(norm(x), norm(features)); x += ffn_gate * drop_path(ffn(norm(x))).

    `ffn_ratio` None leaves the second line out; `norm` False makes all norms identities.
    """

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        *,
        attention: AttentionKind = "deformable",
        num_heads: int = 16,
        num_points: int = 4,
        ratio: float = 0.5,
        ffn_ratio: float | None = 0.25,
        norm: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()

        def build_norm(width: int) -> nn.Module:
            return nn.LayerNorm(width, eps=norm_eps) if norm else nn.Identity()

        self.attn: nn.Module
        if attention == "deformable":
            self.attn = DeformableCrossAttention(
                dim, feature_dim, num_heads=num_heads, num_points=num_points, ratio=ratio
            )
        elif attention == "regular":
            self.attn = RegularCrossAttention(dim, feature_dim, num_heads=num_heads)
        else:
            raise ValueError(f"unknown attention {attention!r}; choose 'deformable' or 'regular'")
        self.query_norm = build_norm(dim)
        self.feature_norm = build_norm(feature_dim)
        self.gate = nn.Parameter(torch.zeros(dim))
        self.ffn = None
        if ffn_ratio is not None:
            self.ffn = ConvFfn(dim, hidden_dim=int(dim * ffn_ratio))
            self.ffn_norm = build_norm(dim)
            self.ffn_gate = nn.Parameter(torch.zeros(dim))
            self.drop_path = DropPath(drop_path)

    def forward(
        self, query: Tensor, size: Size, features: Tensor, feature_size: Size, *, prepare: Prepare = _as_is
    ) -> Tensor:
        """query (B, N, d) on grid `size`, features (B, M, d_f) on grid `feature_size` -> (B, N, d).

        prepare: done to every token of `features` before its norm.
        """
        answer = self.attn(
            self.query_norm(query),
            size,
            features,
            feature_size,
            prepare=lambda tokens: self.feature_norm(prepare(tokens)),
        )
        query = torch.addcmul(query, self.gate, answer)  # one pass over memory
        if self.ffn is not None:
            update = self.drop_path(self.ffn(self.ffn_norm(query), size))
            query = torch.addcmul(query, self.ffn_gate, update)
        return query


class Message(nn.Module):
    """What branch `source` tells branch `target`: its tokens, brought to the target's width and injected."""

    def __init__(
        self, direction: Direction, dims: Sequence[int], *, project: bool = True, **injector: Any
    ) -> None:
        super().__init__()
        self.source, self.target = direction
        source_dim, dim = dims[self.source], dims[self.target]
        self.project = nn.Linear(source_dim, dim) if project else nn.Identity()
        self.injector = Injector(dim, dim if project else source_dim, **injector)

    def forward(self, states: Sequence[TokenMap]) -> TokenMap:
        """The states of all branches -> the target's new state."""
        source, target = states[self.source], states[self.target]
        tokens = self.injector(target.tokens, target.size, source.tokens, source.size, prepare=self.project)
        return TokenMap(tokens, target.size, target.class_token)

    def extra_repr(self) -> str:
        return f"{self.source} -> {self.target}"


class InteractionUnit(nn.Module):
    """Messages sent at the same time: each reads what the branches held before any of them arrived.

    dims: width of every branch; directions: (source, target) of each message, every target once;
    the keyword arguments are those of `Message` and `Injector`.
    """

    def __init__(self, dims: Sequence[int], directions: Sequence[Direction], **message: Any) -> None:
        super().__init__()
        targets = [target for _, target in directions]
        if len(set(targets)) < len(targets):
            raise ValueError(f"a unit reaches every branch at most once, got {directions}; use two units")
        self.targets = targets
        self.messages = nn.ModuleList(Message(d, dims, **message) for d in directions)

    def forward(self, states: Sequence[TokenMap]) -> list[TokenMap]:
        """One state per branch -> one state per branch."""
        updated = list(states)
        for target, message in zip(self.targets, self.messages, strict=True):
            updated[target] = message(states)
        return updated


class Interaction(nn.Module):
    """Units one after the other, each reading what the one before has written.

    dims: width of every branch, largest network first; schedule: see `DIRECTIONS`, by default neighbours both
    ways; the other arguments go to every `Message` and `Injector`.
    """

    def __init__(self, dims: Sequence[int], schedule: Schedule | None = None, **message: Any) -> None:
        super().__init__()
        schedule = adjacent(len(dims)) if schedule is None else schedule
        for source, target in (direction for unit in schedule for direction in unit):
            if source == target or not {source, target} <= set(range(len(dims))):
                raise ValueError(f"{source} -> {target} is no direction between {len(dims)} branches")
        self.units = nn.ModuleList(InteractionUnit(dims, unit, **message) for unit in schedule)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the official code: truncated normal of std 0.02, fan-out normal convolutions, gates 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():  # after the linear layers inside them
            if isinstance(module, DeformableCrossAttention):
                module.reset_parameters()

    def forward(self, states: Sequence[TokenMap]) -> list[TokenMap]:
        """One state per branch -> one state per branch."""
        updated = list(states)
        for unit in self.units:
            updated = unit(updated)
        return updated


def adjacent(num_branches: int, index: int = 0) -> Schedule:
    """Type 4, the default: neighbours both ways, finest pair first: the largest network hears of all."""
    return [_both_ways(a, a + 1) for a in reversed(range(num_branches - 1))]


def alternating(num_branches: int, index: int = 0) -> Schedule:
    """Type 1: neighbours, from the largest network to the smallest at even interactions, back at odd ones."""
    chain = list(range(num_branches))
    return [[step] for step in pairwise(chain if index % 2 == 0 else chain[::-1])]


def cycle_down(num_branches: int, index: int = 0) -> Schedule:
    """Type 2: largest network -> ... -> smallest -> largest."""
    return _cycle(list(range(num_branches)))


def cycle_up(num_branches: int, index: int = 0) -> Schedule:
    """Type 3: smallest network -> ... -> largest -> smallest."""
    return _cycle(list(reversed(range(num_branches))))


def all_pairs(num_branches: int, index: int = 0) -> Schedule:
    """Type 5: every pair both ways, finest first."""
    pairs = [(a, b) for b in range(num_branches) for a in range(b)]
    return [_both_ways(a, b) for a, b in reversed(pairs)]


DIRECTIONS: dict[str, Callable[[int, int], Schedule]] = {
    "adjacent": adjacent,
    "alternating": alternating,
    "cycle_down": cycle_down,
    "cycle_up": cycle_up,
    "all_pairs": all_pairs,
}
"""Table XVII: (number of branches, index of the interaction) -> schedule. The paper draws the types without
naming them; all but "adjacent" are inferred from their printed cost.
"""


def _both_ways(a: int, b: int) -> list[Direction]:
    return [(b, a), (a, b)]


def _cycle(ring: list[int]) -> Schedule:
    return [[step] for step in pairwise([*ring, ring[0]])] if len(ring) > 1 else []
