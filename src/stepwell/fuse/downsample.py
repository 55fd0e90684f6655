"""From pixels back to an encoder's cells: the learned down-samplers by which an up-sampler is trained.

FeatUp, arXiv 2403.10516, section 3.1; LLaVA-UHD v2, arXiv 2412.13871, equation 10. All that they do to a map
is linear in its channels, once the scores of its pixels are known. So a map may be projected to few channels
after its scores were taken: `pool` gets both apart, `forward` does all at once.
Letters: B batch, C channels, V those that are pooled, S channels of scores, (H, W) the map, (h, w) the cells,
K the side of a cell's window.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.linear import Linear
from stepwell.ops.adaptive_conv import reflect
from stepwell.structures import Size

__all__ = [
    "LOGIT_DROPOUT",
    "AttentionDownsampler",
    "Downsampler",
    "DownsamplerConfig",
    "KernelDownsampler",
    "blur",
    "build_downsampler",
]

LOGIT_DROPOUT = 0.2  # share of cells whose scores do not count in a training step
BLUR_RADIUS, BLUR_SIGMA = 2, 1.0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DownsamplerConfig:
    """kind: "attention" weighs the pixels of a window by what they hold, "kernel" weighs them alike in all.
    kernel: K in pixels, by default the encoder's patch. blur and dropout are of "attention".
    """

    kind: Literal["attention", "kernel"] = "attention"
    kernel: Annotated[int, Field(ge=1)] | None = None
    blur: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class AttentionDownsampler(nn.Module):
    """Every cell is a mean of its window, whose pixels are weighed by a softmax of their scores.

    blur: the map is smoothed first. dropout: of the map that the scores are taken from.
    """

    def __init__(self, dim: int, kernel_size: int, *, blur: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.blur = blur
        self.dropout = nn.Dropout(dropout)
        self.linear = Linear(dim, 1)
        self.scale = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.shift = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale, mean=1.0, std=0.01)
        nn.init.normal_(self.shift, std=0.01)

    def forward(self, x: Tensor, grid: Size, kept: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, *grid). kept: as of `pool`."""
        return self.pool(x, self.scores(x), grid, kept)

    def scores(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W)."""
        out: Tensor = self.linear(self.dropout(x).movedim(1, -1)).movedim(-1, 1)
        return out

    def pool(self, x: Tensor, scores: Tensor, grid: Size, kept: Tensor | None = None) -> Tensor:
        """x (B, V, H, W), scores (B, 1, H, W) -> (B, V, *grid).

        kept: (B, *grid), False where the scores of a cell do not count; by default all do, and in training
        a draw of them. Raises ValueError where the windows have no room.
        """
        both = torch.cat([x, scores], 1)
        windows = _windows(blur(both) if self.blur else both, self.kernel_size, grid)
        pixels, logits = windows[:, :-1], windows[:, -1]
        if kept is None and self.training:
            kept = torch.rand(logits.shape[0], *grid, device=x.device) > LOGIT_DROPOUT
        if kept is not None:
            logits = logits * kept[:, None]
        logits = logits * self.scale.flatten()[:, None, None] + self.shift.flatten()[:, None, None]
        return (pixels * logits.softmax(1)[:, None]).sum(2)


class KernelDownsampler(nn.Module):
    """Every cell is a mean of its window under one learned kernel, whatever the pixels hold."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weights = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weights)

    def kernel(self) -> Tensor:
        """(K, K), of sum 1."""
        return self.weights.abs() / self.weights.abs().sum()

    def forward(self, x: Tensor, grid: Size, kept: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, *grid). kept: as of `pool`."""
        return self.pool(x, self.scores(x), grid, kept)

    def scores(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 0, H, W): it needs none."""
        return x[:, :0]

    def pool(self, x: Tensor, scores: Tensor, grid: Size, kept: Tensor | None = None) -> Tensor:
        """x (B, V, H, W) -> (B, V, *grid); neither scores nor kept have a say. Raises ValueError where the
        windows have no room.
        """
        pixels = _windows(x, self.kernel_size, grid)
        return (pixels * self.kernel().flatten()[:, None, None]).sum(2)


Downsampler = AttentionDownsampler | KernelDownsampler


def build_downsampler(config: DownsamplerConfig, dim: int, patch: int) -> Downsampler:
    """For maps of width `dim` of an encoder with patches of `patch` pixels, random weights."""
    size = config.kernel or patch
    if config.kind == "kernel":
        return KernelDownsampler(size)
    return AttentionDownsampler(dim, size, blur=config.blur, dropout=config.dropout)


def blur(x: Tensor) -> Tensor:
    """(B, C, H, W) -> the same, under a Gaussian of 5 x 5 pixels, mirrored at the border."""
    steps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = (-(steps**2) / (2 * BLUR_SIGMA**2)).softmax(0).tolist()
    padded = reflect(x, BLUR_RADIUS)
    for axis in (-2, -1):  # by shifted sums, which are quicker than a convolution of single channels
        length = x.shape[axis]
        padded = sum(weight * padded.narrow(axis, i, length) for i, weight in enumerate(weights))
    return padded


def _windows(x: Tensor, side: int, grid: Size) -> Tensor:
    """(B, V, H, W) -> (B, V, side * side, *grid): windows from the top left, as far apart as there is room,
    and equally far both ways.
    """
    room = [length - side for length in x.shape[-2:]]
    stride = min(space // max(count - 1, 1) for space, count in zip(room, grid, strict=True))
    if min(room) < 0 or (stride < 1 and max(grid) > 1):
        raise ValueError(
            f"{grid[0]}x{grid[1]} windows of {side}x{side} pixels have no room in a map of "
            f"{x.shape[-2]}x{x.shape[-1]}"
        )
    height, width = ((count - 1) * stride + side for count in grid)
    columns = F.unfold(x[..., :height, :width], side, stride=max(stride, 1))
    return columns.view(x.shape[0], x.shape[1], side * side, *grid)
