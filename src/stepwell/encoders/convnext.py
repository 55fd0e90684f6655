"""ConvNeXt as a flat list of layers that tokens pass one by one, at any image size.

Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545. As a branch of a pyramid (PIIP, arXiv 2501.07783) the
stem stands apart, and the downsampling in front of a stage is one entry of the list.
Memory is channels-last throughout: tokens (B, H*W, C), grids (B, H, W, C) and the convolutions' maps
(B, C, H, W) are views of each other. Letters: B batch, C width, (H, W) the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.encoders.encoder import run_layers
from stepwell.layers.depthwise import DepthwiseConv
from stepwell.layers.drop_path import DropPath, drop_path_rates
from stepwell.layers.mlp import Activation, LayerScale, Mlp
from stepwell.ops.rearrange import tokens_to_map
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, Size, Statistics, TokenMap

__all__ = ["ConvNeXt"]


class ConvNeXt(nn.Module):
    """Image -> stem -> layers, as an Encoder.

    `dims`, `depths` and `strides` have one entry per stage; strides[0] is the stem's, the others those of the
    downsampling in front of stages 2, 3, ... A kernel equals its stride there, so stride 1 keeps the grid and
    maps width to width. `drop_path` grows linearly over the residual blocks.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        strides: Sequence[int] = (4, 2, 2, 2),
        stem_kernel: int = 4,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        activation: Activation = "gelu",
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.spec = self.spec_of(dims=dims, depths=depths, strides=strides, mean=mean, std=std)
        if stem_kernel < strides[0]:
            raise ValueError(f"a stem of kernel {stem_kernel} and stride {strides[0]} would skip pixels")
        self.embed = _Stem(dims[0], kernel=stem_kernel, stride=strides[0], norm_eps=norm_eps)
        rates = iter(drop_path_rates(drop_path, sum(depths), "linear"))
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage > 0:
                self.layers.append(
                    _Downsampling(dims[stage - 1], dim, stride=strides[stage], norm_eps=norm_eps)
                )
            for _ in range(depth):
                self.layers.append(
                    _Block(
                        dim,
                        kernel_size=kernel_size,
                        hidden_dim=int(dim * mlp_ratio),
                        norm_eps=norm_eps,
                        activation=activation,
                        layer_scale=layer_scale,
                        drop_path=next(rates),
                    )
                )
        self.depths = tuple(depths)
        self.gradient_checkpointing = checkpointing  # as transformers looks for it
        self.reset_parameters()

    @staticmethod
    def spec_of(
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int],
        mean: Statistics,
        std: Statistics,
    ) -> EncoderSpec:
        """The spec of a network with these constructor arguments."""
        if not len(dims) == len(depths) == len(strides) > 0:
            raise ValueError(
                f"a stage needs width, depth and stride, got {list(dims)}, {list(depths)}, {list(strides)}"
            )
        stage_of_layer = [stage for stage, depth in enumerate(depths) for _ in range(depth + (stage > 0))]
        stage_strides = list(accumulate(strides, mul))
        return EncoderSpec(
            dims=tuple(dims[stage] for stage in stage_of_layer),
            strides=tuple(stage_strides[stage] for stage in stage_of_layer),
            mean=mean,
            std=std,
        )

    def reset_parameters(self) -> None:
        """Truncated normal of std 0.02 for linear and convolution weights, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> tokens; a remainder smaller than a stride is dropped, here and later."""
        return _to_tokens(self.embed(image))

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Layers first..last, both included; an empty range (last < first) returns `state` unchanged."""
        if last < first:
            return state
        assert state.class_token is None
        grid = state.tokens.unflatten(1, state.size)
        checkpointing = self.gradient_checkpointing and self.training
        return _to_tokens(run_layers(self.layers, grid, first, last, checkpointing=checkpointing))

    def to_map(self, state: TokenMap) -> Tensor:
        """-> (B, C, H, W), a view whose memory is channels-last."""
        return tokens_to_map(state.tokens, state.size)

    def forward(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> the last layer's tokens."""
        return self.run(self.stem(image), 0, len(self.layers) - 1)


class _Stem(nn.Module):
    """Convolution and norm. Zeros around make the grid side // stride also for a kernel larger than it."""

    def __init__(self, dim: int, *, kernel: int, stride: int, norm_eps: float) -> None:
        super().__init__()
        self.overlap = kernel - stride
        self.conv = nn.Conv2d(3, dim, kernel, stride=stride)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, H, W, C)."""
        _check_side(image.shape[-2:], self.conv.stride[0])
        if self.overlap:
            before, after = self.overlap // 2, self.overlap - self.overlap // 2
            image = F.pad(image, (before, after, before, after))
        map = self.conv(image.contiguous(memory_format=torch.channels_last))
        grid: Tensor = self.norm(map.permute(0, 2, 3, 1))
        return grid


class _Downsampling(nn.Module):
    """Norm, then a convolution whose kernel is its stride."""

    def __init__(self, dim: int, out_dim: int, *, stride: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.conv = nn.Conv2d(dim, out_dim, stride, stride=stride)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H // stride, W // stride, out_dim)."""
        _check_side(grid.shape[1:3], self.conv.stride[0])
        map: Tensor = self.conv(self.norm(grid).permute(0, 3, 1, 2))
        return map.permute(0, 2, 3, 1)


class _Block(nn.Module):
    """Depthwise convolution, norm, perceptron, learned scale, on a residual stream."""

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int,
        kernel_size: int,
        norm_eps: float,
        activation: Activation,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(dim, kernel_size)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_dim=hidden_dim, activation=activation)
        self.scale = LayerScale(dim, init=layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = self.dwconv(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = grid + self.drop_path(self.scale(self.mlp(self.norm(x))))
        return out


def _to_tokens(grid: Tensor) -> TokenMap:
    """(B, H, W, C) -> tokens and their size."""
    return TokenMap(grid.flatten(1, 2), (grid.shape[1], grid.shape[2]))


def _check_side(size: Size | torch.Size, stride: int) -> None:
    if min(size) < stride:
        raise ValueError(
            f"{size[0]}x{size[1]} is smaller than one cell of stride {stride}; use a larger image"
        )
