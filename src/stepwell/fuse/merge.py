"""The maps of all branches become one map, or one sequence of visual tokens.

PIIP, arXiv 2501.07783, equation 3: every map through a stack of its own, bilinear to the grid of the last
branch, a weighted sum. The official code has three kinds of stacks (`dense_stacks`, `stage_stacks`,
`linear_stacks`), and a projector for language models (`TokenMerge`) that resizes first and has no weights.
Letters: B batch, C width of a branch, (h, w) its grid, (H, W) the common grid, E the language model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.conv import Conv2d
from stepwell.layers.linear import Linear
from stepwell.layers.position import SHORTEST, fraction_position_embedding
from stepwell.ops.rearrange import map_to_tokens
from stepwell.ops.resize import cut_from_map, resize_map
from stepwell.structures import Size, TokenMap

__all__ = [
    "BranchMerge",
    "LastMap",
    "ProjectorConfig",
    "TokenMerge",
    "dense_stacks",
    "linear_stacks",
    "stage_stacks",
]


class BranchMerge(nn.Module):
    """sum over branches of weight * resize(stack(map)).

    stacks: one module a merged branch, all ending at the same width. branches: which of the maps they take,
    by default all; the rest of the maps is left out (Table IX).
    """

    def __init__(self, stacks: Sequence[nn.Module], *, branches: Sequence[int] | None = None) -> None:
        super().__init__()
        self.branches = tuple(range(len(stacks)) if branches is None else branches)
        self.stacks = nn.ModuleList(stacks)
        self.weights = nn.Parameter(torch.ones(len(stacks)))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weights)

    def forward(self, maps: Sequence[Tensor], size: Size | None = None) -> Tensor:
        """maps: (B, C, h, w) of every branch -> (B, C', H, W), by default on the last branch's grid."""
        size = (maps[-1].shape[-2], maps[-1].shape[-1]) if size is None else size
        terms = (
            weight * resize_map(stack(maps[branch]), size)
            for weight, stack, branch in zip(self.weights, self.stacks, self.branches, strict=True)
        )
        merged: Tensor = reduce(torch.add, terms)
        return merged


class LastMap(nn.Module):
    """In place of a merge: the last branch's map as it is, for baselines of a single branch."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C, h, w) of every branch -> the last one."""
        return maps[-1]


def dense_stacks(dims: Sequence[int], *, num_layers: int = 2, num_groups: int = 32) -> list[nn.Module]:
    """All-ViT pyramids, to the width of branch 1: (3x3 convolution, GroupNorm, ReLU) twice, everywhere."""
    return [_conv_stack(dim, dims[0], num_layers, num_groups) for dim in dims]


def stage_stacks(dims: Sequence[int], *, num_groups: int = 32) -> list[nn.Module]:
    """With ConvNeXt, to the width of branch 1: GroupNorm, ReLU, elsewhere after a 3x3 convolution."""
    first = nn.Sequential(nn.GroupNorm(num_groups, dims[0]), nn.ReLU())
    return [first, *(_conv_stack(dim, dims[0], 1, num_groups) for dim in dims[1:])]


def _conv_stack(dim: int, out_dim: int, num_layers: int, num_groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in [dim, *[out_dim] * (num_layers - 1)]:
        layers += [_StackConv(width, out_dim), nn.GroupNorm(num_groups, out_dim), nn.ReLU()]
    return nn.Sequential(*layers)


class _StackConv(Conv2d):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        """Normal, by the fan-out."""
        nn.init.normal_(self.weight, std=(2 / (9 * self.out_channels)) ** 0.5)


def linear_stacks(dims: Sequence[int], *, num_groups: int = 32) -> list[nn.Module]:
    """Classifiers, to the width of branch 1: GroupNorm; elsewhere GroupNorm, Linear, GroupNorm."""

    def norm(dim: int) -> nn.Module:
        return nn.GroupNorm(num_groups, dim)

    others = (_LinearStack(norm(dim), Linear(dim, dims[0]), norm(dims[0])) for dim in dims[1:])
    return [norm(dims[0]), *others]


class _LinearStack(nn.Sequential):
    """The layer in the middle sees cells, and the others maps."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        before, linear, behind = self
        out: Tensor = behind(linear(before(x).movedim(1, -1)).movedim(-1, 1))
        return out


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProjectorConfig:
    """PIIP-LLaVA's projector.

    norm: "groupnorm" is taken over the grid in `num_groups` groups of channels; "layernorm" has no parameters
    and is taken token by token. hidden_dim: None is the language model's width. grid: of the tokens; None is
    the last branch's. place: weight of a position embedding, of its column and row, that is added to every
    token; the published models have none. place_shortest: its shortest wavelength, as a fraction of a side of
    the image: what lies closer together is hardly told apart, as in views of small regions.
    """

    norm: Literal["groupnorm", "layernorm"] = "groupnorm"
    num_groups: Annotated[int, Field(gt=0)] = 32
    hidden_dim: Annotated[int, Field(gt=0)] | None = None
    grid: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    place: Annotated[float, Field(ge=0)] = 0.0
    place_shortest: Annotated[float, Field(gt=0)] = SHORTEST


class TokenMerge(nn.Module):
    """Every map to one grid, then Linear, norm, GELU, Linear; the sum over branches is the tokens."""

    def __init__(self, dims: Sequence[int], out_dim: int, config: ProjectorConfig) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim or out_dim
        if config.norm == "groupnorm" and hidden_dim % config.num_groups:
            raise ValueError(
                f"width {hidden_dim} does not divide into {config.num_groups} groups; change num_groups"
            )
        self.config = config
        self.stacks = nn.ModuleList(
            nn.Sequential(
                Linear(dim, hidden_dim),
                _TokenGroupNorm(config.num_groups, hidden_dim)
                if config.norm == "groupnorm"
                else nn.LayerNorm(hidden_dim, elementwise_affine=False),
                nn.GELU(),
                Linear(hidden_dim, out_dim),
            )
            for dim in dims
        )

    def forward(self, maps: Sequence[Tensor], cut: Tensor | None = None) -> TokenMap:
        """maps: (B, C, h, w) of every branch -> tokens (B, H*W, E) on their grid.

        cut (B, 4): where the last branch looks in what the others see, a box in fractions of that. Tokens are
        of the cut then, their places those in the whole.
        """
        size = self.config.grid or (maps[-1].shape[-2], maps[-1].shape[-1])
        tokens = reduce(
            torch.add,
            (stack(map_to_tokens(x)) for stack, x in zip(self.stacks, _on(size, maps, cut), strict=True)),
        )
        if self.config.place:
            positions = fraction_position_embedding(
                tokens.shape[-1], size, cut, shortest=self.config.place_shortest, device=tokens.device
            )
            tokens = tokens + self.config.place * positions.to(tokens.dtype)
        return TokenMap(tokens, size)


def _on(size: Size, maps: Sequence[Tensor], cut: Tensor | None) -> Iterator[Tensor]:
    """The maps at that size; of all but the last, what lies in the cut."""
    for i, x in enumerate(maps, 1):
        yield resize_map(x, size) if cut is None or i == len(maps) else cut_from_map(x, size, cut)


class _TokenGroupNorm(nn.GroupNorm):
    """GroupNorm whose channels come last: statistics over all tokens and a group of channels."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)
