"""Two encoders on one image: the slow one's last map goes into the fast one, in between and at the end.

LLaVA-HR, arXiv 2403.03003, the mixture-of-resolution adapter, in the form of its released code. Letters:
B batch, f tokens of the fast encoder (B, N, d) on its grid (H, W), s the slow encoder's map (B, c, h, w).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.layers.depthwise import DepthwiseConv
from stepwell.layers.linear import Linear
from stepwell.ops.precision import at_least_single
from stepwell.ops.rearrange import map_to_tokens, tokens_to_map
from stepwell.ops.resize import put_on_map
from stepwell.structures import Size

__all__ = ["MixtureAdapter", "MixtureMerge", "to_grid"]


def to_grid(x: Tensor, size: Size, cut: Tensor | None = None) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W): bilinear with aligned corners where a side grows, else means of the cells
    that fall together; both are rounded once.

    cut (B, 4): x shows a box, in fractions of what the grid shows, and beside it there is zero.
    """
    if cut is not None:
        return put_on_map(x, size, cut)
    if x.shape[-2:] == size:
        return x
    if x.shape[-2] < size[0] or x.shape[-1] < size[1]:
        exact = x.to(at_least_single(x.dtype))  # torch interpolates large maps in their own precision
        return F.interpolate(exact, size, mode="bilinear", align_corners=True).to(x.dtype)
    return F.adaptive_avg_pool2d(x, size)


class MixtureAdapter(nn.Module):
    """f' = f + convolutions(f), s' = MLP(s) on its grid; f' + tanh(gate) * s', of one gate for an image.

    What is added starts at zero: a new adapter changes nothing.
    """

    def __init__(self, dim: int, slow_dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(DepthwiseConv(dim, 7), nn.GELU(), Linear(dim, dim))
        self.slow = nn.Sequential(Linear(slow_dim, slow_dim), nn.GELU(), Linear(slow_dim, dim))
        self.gate = nn.Sequential(Linear(2 * dim, dim // 2), nn.GELU(), Linear(dim // 2, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the released code: the first layers Xavier uniform, the last ones zero, biases zero."""
        for stack in (self.local, self.slow):
            for name, parameter in stack.named_parameters():
                if name == "0.weight":
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, size: Size, slow: Tensor, cut: Tensor | None = None) -> Tensor:
        """tokens (B, N, d) on the grid `size`, slow (B, c, h, w) -> (B, N, d). cut: as of `to_grid`."""
        convolution, activation, linear = self.local
        tokens = tokens + linear(activation(map_to_tokens(convolution(tokens_to_map(tokens, size)))))
        seen = map_to_tokens(to_grid(self.slow(slow.movedim(1, -1)).movedim(-1, 1), size, cut))
        gate = self.gate(torch.cat([tokens.mean(1), seen.mean(1)], 1)).tanh()
        out: Tensor = tokens + gate[:, None] * seen
        return out


class MixtureMerge(nn.Module):
    """The last features of both, each behind a linear layer, added on the fast encoder's grid."""

    def __init__(self, dim: int, slow_dim: int) -> None:
        super().__init__()
        self.fast = Linear(dim, dim)
        self.slow = Linear(slow_dim, dim)

    def forward(self, tokens: Tensor, size: Size, slow: Tensor, cut: Tensor | None = None) -> Tensor:
        """tokens (B, N, d) on the grid `size`, slow (B, c, h, w) -> (B, N, d). cut: as of `to_grid`."""
        merged: Tensor = self.fast(tokens) + self.slow(map_to_tokens(to_grid(slow, size, cut)))
        return merged
