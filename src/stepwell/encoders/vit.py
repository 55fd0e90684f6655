"""The plain vision transformer in all its families, at any image size.

DeiT and DeiT III, AugReg, MAE, DINOv2, BEiT v2, Uni-Perceiver, CLIP and InternViT-6B are one class with
different arguments (catalogue.py names them). They are the branches of PIIP, arXiv 2501.07783; the network is
Dosovitskiy et al., arXiv 2010.11929. Letters: B batch, N tokens, C width, (H, W) the grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stepwell.encoders.encoder import run_layers, side_by_side, with_grid
from stepwell.layers.attention import SelfAttention, WindowPadding
from stepwell.layers.drop_path import DropPath, DropPathSchedule, drop_path_rates
from stepwell.layers.mlp import Activation, LayerScale, Mlp
from stepwell.layers.norm import NormKind, build_norm
from stepwell.layers.position import resize_position_embedding, sincos_position_embedding
from stepwell.ops.rearrange import tokens_to_map
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, Size, Statistics, TokenMap

__all__ = ["Position", "PositionEmbedding", "TransformerBlock", "VisionTransformer"]

Position = Literal["table", "sincos", "relative", "none"]
"""A learned position embedding resized to the grid; a fixed one of sines and cosines; a learned bias per
offset in every attention layer (BEiT); nothing.
"""


class VisionTransformer(nn.Module):
    """Image -> patches -> blocks, as an Encoder: layer i is block i, every stride is the patch side.

    `windows` is one window side for all blocks or one per block, 0 for global attention. `position_grid` is
    (rows, cols) of the learned position embedding, or with position="relative" the grid of the global blocks.
    `class_slot`, `temporal_rows` and `antialias` are those of `PositionEmbedding`. `registers`: learned
    tokens behind the class token, without a place in the image (DINOv2 with registers, arXiv 2309.16588;
    DeiT's distillation token is one too). `embed_norm`: a norm after the embedding, as Uni-Perceiver and CLIP
    have (`pre_layrnorm`). `final_norm` is applied by `forward` only: fusion wants the states before it.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        patch: int = 16,
        patch_bias: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm: NormKind = "layernorm",
        norm_eps: float = 1e-6,
        activation: Activation = "gelu",
        layer_scale: float | None = None,
        windows: int | Sequence[int] = 0,
        window_padding: WindowPadding = "tokens",
        position: Position = "table",
        position_grid: Size = (14, 14),
        temporal_rows: int = 0,
        antialias: bool = False,
        class_token: bool = False,
        class_slot: bool = False,
        registers: int = 0,
        embed_norm: bool = False,
        final_norm: bool = False,
        drop_path: float = 0.0,
        drop_path_schedule: DropPathSchedule = "constant",
        checkpointing: bool = False,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.spec = self.spec_of(dim=dim, depth=depth, patch=patch, windows=windows, mean=mean, std=std)
        windows = _per_block(windows, depth)
        if (class_token or registers) and any(windows):
            raise ValueError(
                "windowed blocks have no place for a class token and registers; set class_token=False and "
                "registers=0, or windows=0"
            )
        if class_slot and position != "table":
            raise ValueError(
                f"class_slot is a row of a position table, of which position={position!r} has none"
            )
        if position not in ("table", "sincos", "relative", "none"):
            raise ValueError(f"unknown position {position!r}; choose 'table', 'sincos', 'relative' or 'none'")
        if position == "relative" and (class_token or registers):
            raise ValueError(
                "relative positions are defined between patches only; set class_token=False and registers=0"
            )

        self.patch_embed = _PatchEmbed(dim, patch=patch, bias=patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.position: PositionEmbedding | _SincosPositionEmbedding | None = None
        if position == "table":
            self.position = PositionEmbedding(
                dim,
                position_grid,
                class_slot=class_slot,
                temporal_rows=temporal_rows,
                antialias=antialias,
            )
        elif position == "sincos":
            self.position = _SincosPositionEmbedding(dim)
        self.embed_norm = build_norm(norm, dim, eps=norm_eps) if embed_norm else nn.Identity()
        self.relative = position == "relative"
        self.blocks = nn.ModuleList()
        for window, rate in zip(windows, drop_path_rates(drop_path, depth, drop_path_schedule), strict=True):
            grid = (window, window) if window else position_grid
            attention = SelfAttention(
                dim,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                window=window,
                window_padding=window_padding,
                relative_grid=grid if self.relative else None,
            )
            block = TransformerBlock(
                attention,
                dim,
                hidden_dim=int(dim * mlp_ratio),
                activation=activation,
                norm=norm,
                norm_eps=norm_eps,
                layer_scale=layer_scale,
                drop_path=rate,
            )
            self.blocks.append(block)
        self.norm = build_norm(norm, dim, eps=norm_eps) if final_norm else nn.Identity()
        self.windows = windows
        self.position_grid = position_grid
        self.antialias = antialias
        self.class_slot = class_slot
        self.final_norm = final_norm
        self.gradient_checkpointing = checkpointing  # as transformers looks for it
        self.reset_parameters()

    @staticmethod
    def spec_of(
        *,
        dim: int,
        depth: int,
        patch: int,
        windows: int | Sequence[int],
        mean: Statistics,
        std: Statistics,
    ) -> EncoderSpec:
        """The spec of a network with these constructor arguments."""
        window = max(_per_block(windows, depth), default=0)
        return EncoderSpec(dims=(dim,) * depth, strides=(patch,) * depth, mean=mean, std=std, window=window)

    def reset_parameters(self) -> None:
        """Truncated normal of std 0.02 for linear weights, tables and tokens; biases 0; norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PositionEmbedding):
                module.reset_parameters()
        for token in (self.class_token, self.registers):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> tokens with positions; a remainder smaller than a patch is dropped."""
        state: TokenMap = self(image, only_stem=True)  # so that what brings weights to `forward` brings them
        return state

    def _embed(self, image: Tensor) -> TokenMap:
        tokens, size = self.patch_embed(image)
        class_token = None if self.class_token is None else self.class_token.expand(len(tokens), -1, -1)
        if self.position is not None:
            cells, slot = self.position(size, tokens)
            tokens = tokens + cells
            class_token = class_token if class_token is None or slot is None else class_token + slot
        registers = None if self.registers is None else self.registers.expand(len(tokens), -1, -1)
        return _on_all_tokens(self.embed_norm, TokenMap(tokens, size, class_token, registers))

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Blocks first..last, both included; an empty range (last < first) returns `state` unchanged."""
        if last < first:
            return state
        checkpointing = self.gradient_checkpointing and self.training
        tokens = side_by_side(state)
        tokens = run_layers(self.blocks, tokens, first, last, state.size, checkpointing=checkpointing)
        return with_grid(tokens, state)

    def to_map(self, state: TokenMap) -> Tensor:
        """-> (B, C, H, W) of the patch tokens: a view, so its memory is channels-last."""
        return tokens_to_map(state.tokens, state.size)

    def forward(self, image: Tensor, *, only_stem: bool = False) -> TokenMap:
        """(B, 3, height, width) -> the last layer's tokens, after the final norm where there is one.

        only_stem: what `stem` gives.
        """
        state = self._embed(image)
        if only_stem:
            return state
        return _on_all_tokens(self.norm, self.run(state, 0, len(self.blocks) - 1))


class TransformerBlock(nn.Module):
    """Attention and perceptron on a residual stream; no scales if `layer_scale` is None."""

    def __init__(
        self,
        attention: SelfAttention,
        dim: int,
        *,
        hidden_dim: int,
        activation: Activation = "gelu",
        norm: NormKind = "layernorm",
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = build_norm(norm, dim, eps=norm_eps)
        self.attn = attention
        self.scale1 = LayerScale(dim, init=layer_scale)
        self.norm2 = build_norm(norm, dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_dim=hidden_dim, activation=activation)
        self.scale2 = LayerScale(dim, init=layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, [1 +] H*W, C) -> the same, size = (H, W)."""
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), size)))
        out: Tensor = x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
        return out


class _PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, dim: int, *, patch: int, bias: bool) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, dim, patch, stride=patch, bias=bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Size]:
        """(B, 3, height, width) -> tokens (B, H*W, C) and their grid (H, W), remainders dropped."""
        height, width = image.shape[-2:]
        if height < self.patch or width < self.patch:
            raise ValueError(f"an image of {height}x{width} is smaller than one patch of {self.patch}")
        map = self.proj(image.contiguous(memory_format=torch.channels_last))
        return map.permute(0, 2, 3, 1).flatten(1, 2), (height // self.patch, width // self.patch)


class PositionEmbedding(nn.Module):
    """A learned vector per cell of a grid, resized to whatever grid is asked for.

    `table` ([1 +] rows*cols, C) has the class token's row in front when `class_slot`, also where there is no
    class token to add it to. `antialias`: as in `resize_position_embedding`. Row 0 of `temporal`, if
    there is one, is added to every cell (Uni-Perceiver, where the other rows are for video).
    """

    def __init__(
        self,
        dim: int,
        grid: Size,
        *,
        class_slot: bool = False,
        temporal_rows: int = 0,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.antialias = antialias
        self.class_slot = class_slot
        self.table = nn.Parameter(torch.zeros(grid[0] * grid[1] + class_slot, dim))
        self.temporal = nn.Parameter(torch.zeros(temporal_rows, dim)) if temporal_rows else None

    def reset_parameters(self) -> None:
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, size: Size, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> what to add to the patches, (H*W, C), and to the class token, (1, C), in the dtype of `like`."""
        table = resize_position_embedding(
            self.table, self.grid, size, class_slot=self.class_slot, antialias=self.antialias
        )
        table = table.to(like.dtype)
        slot, cells = (table[:1], table[1:]) if self.class_slot else (None, table)
        if self.temporal is not None:
            cells = cells + self.temporal[0].to(like.dtype)
        return cells, slot


class _SincosPositionEmbedding(nn.Module):
    """The same without parameters, and nothing for the class token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, size: Size, like: Tensor) -> tuple[Tensor, None]:
        """-> what to add to the patches, (H*W, C), in the dtype of `like`."""
        return sincos_position_embedding(self.dim, size, device=like.device).to(like.dtype), None


def _on_all_tokens(norm: nn.Module, state: TokenMap) -> TokenMap:
    """A token-by-token module on patches, class token and registers."""
    class_token = None if state.class_token is None else norm(state.class_token)
    registers = None if state.registers is None else norm(state.registers)
    return TokenMap(norm(state.tokens), state.size, class_token, registers)


def _per_block(windows: int | Sequence[int], depth: int) -> tuple[int, ...]:
    windows = (windows,) * depth if isinstance(windows, int) else tuple(windows)
    if len(windows) != depth:
        raise ValueError(f"{depth} blocks need one window each, got {len(windows)}: {windows}")
    return windows
