"""Self-attention over a grid of tokens: global, or in square windows that tile the grid from the top left.

Windows neither shift nor mask (ViTDet, Li et al., arXiv 2203.16527; PIIP, arXiv 2501.07783, section IV-A). A
grid that the window does not divide is padded at its right and bottom, and the padded cells take part in the
softmax; what they hold is a choice, `WindowPadding`.
Letters: B batch, N tokens, C width, h heads, d = C / h, (H, W) the grid, w the window's side.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.layers.linear import Linear
from stepwell.layers.norm import RMSNorm
from stepwell.layers.position import RelativeBias
from stepwell.ops.choose import choose
from stepwell.ops.derivatives import with_derivatives_of
from stepwell.ops.precision import at_least_single, without_autocast
from stepwell.ops.rearrange import merge_windows, split_windows
from stepwell.structures import Size

__all__ = ["SelfAttention", "WindowPadding", "attention", "attention_reference"]

WindowPadding = Literal["tokens", "qkv"]
"""What a padded cell holds: a zero token, so that its key and value are the biases of the qkv layer (every
released PIIP model was trained so); or zeros in place of query, key and value.
"""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q (B, h, N, d), k, v (B, h, M, d), bias (h, N, M) -> like q."""
    if not choose():
        return attention_reference(q, k, v, bias)
    mask = None if bias is None else bias[None].to(v.dtype)
    with without_autocast(v.device):  # it would round on the two paths in different places
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    return with_derivatives_of(attention_reference, inputs, out)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `attention`. In fp32 at least: the softmax loses its tails in half precision."""
    dtype = at_least_single(q.dtype)
    with without_autocast(v.device):
        scores = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias.to(dtype)
        out: Tensor = (scores.softmax(-1) @ v.to(dtype)).to(v.dtype)
    return out


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens on a grid.

    `window` 0 attends globally. `qk_norm` is an RMSNorm of queries and keys over the full width, before the
    heads are split (InternViT-6B). `relative_grid` (rows, cols) adds a learned bias per head and offset as in
    BEiT; it is the window's side twice, or the only grid that a global layer then takes.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        window: int = 0,
        window_padding: WindowPadding = "tokens",
        relative_grid: Size | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        if window < 0:
            raise ValueError(f"window must be positive, or 0 for global attention, got {window}")
        if window_padding not in ("tokens", "qkv"):
            raise ValueError(f"unknown window padding {window_padding!r}; choose 'tokens' or 'qkv'")
        self.num_heads = num_heads
        self.window = window
        self.window_padding = window_padding
        self.relative_grid = relative_grid
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.relative_table: nn.Parameter | None = None
        self._relative_bias: RelativeBias | None = None
        if relative_grid is not None:
            rows, cols = relative_grid
            self._relative_bias = RelativeBias(relative_grid)
            self.relative_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * cols - 1), num_heads))
        self.proj = Linear(dim, dim)

    def reset_parameters(self) -> None:
        if self.relative_table is not None:
            nn.init.zeros_(self.relative_table)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        """tokens (B, N, C) -> (B, N, C), size = (H, W).

        N = H*W, or H*W + 1 with a class token in front, which a windowed layer does not take.
        """
        if not self.window and self.relative_grid not in (None, size):
            raise ValueError(
                f"this global layer has relative positions for a {self.relative_grid} grid and got {size}; "
                "resize the image, or give the layer a window"
            )
        if self.window:
            mixed = merge_windows(self._attend(*self._project_windows(tokens, size)), size, self.window)
        else:
            mixed = self._attend(*self._project(tokens))
        out: Tensor = self.proj(mixed)
        return out

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) -> q, k, v, each (..., C)."""
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return self.q_norm(q), self.k_norm(k), v

    def _project_windows(self, tokens: Tensor, size: Size) -> tuple[Tensor, ...]:
        """(B, H*W, C) -> q, k, v, each (B * windows, w*w, C)."""
        if self.window_padding == "qkv":
            return tuple(split_windows(x, size, self.window) for x in self._project(tokens))
        ragged = size[0] % self.window or size[1] % self.window
        if not ragged or not choose():
            return self._project(split_windows(tokens, size, self.window))
        padding = self._project(tokens.new_zeros(tokens.shape[-1]))  # padded cells are alike: project one
        return tuple(
            split_windows(x, size, self.window, padding=value)
            for x, value in zip(self._project(tokens), padding, strict=True)
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, C) each -> (B, N, C)."""
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        bias = None
        if self.relative_table is not None and self._relative_bias is not None:
            bias = self._relative_bias(self.relative_table)
        return attention(q, k, v, bias).transpose(1, 2).flatten(2)
