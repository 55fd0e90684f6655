"""The maps of all branches become one map, or one sequence of visual tokens.

PIIP, arXiv 2501.07783, equation 3: every map through a stack of its own, bilinear to the grid of the last
branch, a weighted sum. The official code has three kinds of stacks (`dense_stacks`, `stage_stacks`,
`linear_stacks`), and a projector for language models (`TokenMerge`) that resizes first and has no weights.
Letters: B batch, C width of a branch, (h, w) its grid, (H, W) the common grid, E the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.position import place_embedding
from stepwell.ops.rearrange import map_to_tokens
from stepwell.structures import Size, TokenMap

__all__ = [
    "BranchMerge",
    "CellLinear",
    "LastMap",
    "ProjectorConfig",
    "TokenGroupNorm",
    "TokenMerge",
    "dense_stacks",
    "linear_stacks",
    "resize_map",
    "stage_stacks",
]


def resize_map(x: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear by target size, corners not aligned, in fp32 at least."""
    if x.shape[-2:] == size:
        return x
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(exact, size, mode="bilinear", align_corners=False).to(x.dtype)


class BranchMerge(nn.Module):
    """sum over branches of weight * resize(stack(map)).

    stacks: one module a merged branch, all ending at the same width. branches: which of the maps they take,
    by default all; the rest of the maps is left out (Table IX).
    """

    def __init__(self, stacks: Sequence[nn.Module], *, branches: Sequence[int] | None = None) -> None:
        super().__init__()
        self.branches = tuple(range(len(stacks)) if branches is None else branches)
        if not stacks or len(self.branches) != len(stacks):
            raise ValueError(
                f"{len(stacks)} stacks cannot merge branches {self.branches}; give one stack each"
            )
        if len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches {self.branches} must be merged once each")
        self.stacks = nn.ModuleList(stacks)
        self.weights = nn.Parameter(torch.ones(len(stacks)))

    def forward(self, maps: Sequence[Tensor], size: Size | None = None) -> Tensor:
        """maps: (B, C, h, w) of every branch -> (B, C', H, W), by default on the last branch's grid."""
        size = (maps[-1].shape[-2], maps[-1].shape[-1]) if size is None else size
        merged: Tensor | None = None
        for weight, stack, branch in zip(self.weights, self.stacks, self.branches, strict=True):
            term = resize_map(stack(maps[branch]), size)
            merged = weight * term if merged is None else torch.addcmul(merged, weight, term)
        assert merged is not None
        return merged


class LastMap(nn.Module):
    """In place of a merge: the last branch's map as it is, for baselines of a single branch."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C, h, w) of every branch -> the last one."""
        return maps[-1]


def dense_stacks(
    dims: Sequence[int], *, num_layers: int = 2, num_groups: int = 32, norm_eps: float = 1e-5
) -> list[nn.Module]:
    """All-ViT pyramids, to the width of branch 1: (3x3 convolution, GroupNorm, ReLU) twice, everywhere."""
    return [_conv_stack(dim, dims[0], num_layers, num_groups, norm_eps) for dim in dims]


def stage_stacks(dims: Sequence[int], *, num_groups: int = 32, norm_eps: float = 1e-5) -> list[nn.Module]:
    """With ConvNeXt, to the width of branch 1: GroupNorm, ReLU, elsewhere after a 3x3 convolution."""
    first = nn.Sequential(nn.GroupNorm(num_groups, dims[0], eps=norm_eps), nn.ReLU())
    return [first, *(_conv_stack(dim, dims[0], 1, num_groups, norm_eps) for dim in dims[1:])]


def linear_stacks(dims: Sequence[int], *, num_groups: int = 32, norm_eps: float = 1e-5) -> list[nn.Module]:
    """Classifiers, to the width of branch 1: GroupNorm; elsewhere GroupNorm, Linear, GroupNorm."""

    def norm(dim: int) -> nn.Module:
        return nn.GroupNorm(num_groups, dim, eps=norm_eps)

    others = (nn.Sequential(norm(dim), CellLinear(dim, dims[0]), norm(dims[0])) for dim in dims[1:])
    return [norm(dims[0]), *others]


class CellLinear(nn.Linear):
    """A linear layer on every cell of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProjectorConfig:
    """PIIP-LLaVA's projector, `TokenMerge`."""

    norm: Literal["groupnorm", "layernorm"] = "groupnorm"
    num_groups: Annotated[int, Field(gt=0)] = 32
    hidden_dim: Annotated[int, Field(gt=0)] | None = None  # None: the language model's width
    grid: tuple[int, int] | None = None  # None: the grid of the last branch
    place: Annotated[float, Field(ge=0)] = 0.0  # weight of a position embedding on every token

    def build(self, dims: Sequence[int], out_dim: int) -> TokenMerge:
        """The projector of branches of these widths, random weights."""
        return TokenMerge(
            dims,
            out_dim,
            hidden_dim=self.hidden_dim,
            norm=self.norm,
            num_groups=self.num_groups,
            grid=self.grid,
            place=self.place,
        )


class TokenMerge(nn.Module):
    """PIIP-LLaVA's projector: every map to one grid, then Linear, norm, GELU, Linear; the sum is the tokens.

    norm "groupnorm" is taken over the grid in `num_groups` groups of channels; "layernorm" has no parameters
    and is taken token by token. `grid` is the fixed grid of the tokens; None means the last branch's. `place`
    is the weight of a position embedding of each cell's column and row that is added to its token; the
    published models have none.
    """

    def __init__(
        self,
        dims: Sequence[int],
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        norm: Literal["groupnorm", "layernorm"] = "groupnorm",
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        grid: Size | None = None,
        place: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        if norm not in ("groupnorm", "layernorm"):
            raise ValueError(f"unknown norm {norm!r}; choose 'groupnorm' or 'layernorm'")
        if norm == "groupnorm" and hidden_dim % num_groups:
            raise ValueError(
                f"width {hidden_dim} does not divide into {num_groups} groups; change num_groups"
            )
        self.grid = grid
        self.place = place
        self.stacks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, hidden_dim),
                TokenGroupNorm(num_groups, hidden_dim, eps=norm_eps)
                if norm == "groupnorm"
                else nn.LayerNorm(hidden_dim, eps=norm_eps, elementwise_affine=False),
                nn.GELU(),
                nn.Linear(hidden_dim, out_dim),
            )
            for dim in dims
        )

    def forward(self, maps: Sequence[Tensor]) -> TokenMap:
        """maps: (B, C, h, w) of every branch -> tokens (B, H*W, E) on their grid."""
        if len(maps) != len(self.stacks):
            raise ValueError(f"this projector merges {len(self.stacks)} branches and got {len(maps)} maps")
        size = self.grid or (maps[-1].shape[-2], maps[-1].shape[-1])
        tokens: Tensor | None = None
        for stack, x in zip(self.stacks, maps, strict=True):
            term = stack(map_to_tokens(resize_map(x, size)))
            tokens = term if tokens is None else tokens + term
        assert tokens is not None
        if self.place:
            embedding = place_embedding(tokens.shape[-1], size, device=tokens.device)
            tokens = tokens + self.place * embedding.to(tokens.dtype)
        return TokenMap(tokens, size)


class TokenGroupNorm(nn.GroupNorm):
    """GroupNorm whose channels come last: statistics over all tokens and a group of channels."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


def _conv_stack(dim: int, out_dim: int, num_layers: int, num_groups: int, norm_eps: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in [dim, *[out_dim] * (num_layers - 1)]:
        conv = nn.Conv2d(width, out_dim, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, std=(2 / (9 * out_dim)) ** 0.5)
        layers += [conv, nn.GroupNorm(num_groups, out_dim, eps=norm_eps), nn.ReLU()]
    return nn.Sequential(*layers)
