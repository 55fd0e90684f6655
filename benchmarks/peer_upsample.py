"""A straightforward inverse pyramid, the peer of the benchmark: what the official code does where its CUDA op
is missing.

The map is enlarged and padded, every pixel's neighbours are copied by F.unfold and weighed by einsum; the
similarities are as many shifted products. Modules carry our names, so that the benchmark loads one set of
weights into both and compares outputs. Letters: B batch, C channels, (H, W) pixels, K the kernel's side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unfold_conv(x: Tensor, kernels: Tensor, *, by: str = "einsum") -> Tensor:
    """x (B, C, H + K - 1, W + K - 1), kernels (B, K*K, H, W) -> (B, C, H, W). by: einsum, or a product and a
    sum."""
    side = round(kernels.shape[1] ** 0.5)
    neighbours = F.unfold(x, side).unflatten(1, (x.shape[1], side * side))
    if by == "einsum":
        out = torch.einsum("bcop,bop->bcp", neighbours, kernels.flatten(2))
    else:
        out = (neighbours * kernels.flatten(2)[:, None]).sum(2)
    return out.unflatten(2, kernels.shape[2:])


class PeerStage(nn.Module):
    def __init__(self, radius: int = 3, key_dim: int = 32) -> None:
        super().__init__()
        neighbours = (2 * radius + 1) ** 2
        self.radius = radius
        self.keys = _network(3, key_dim, key_dim)
        self.correction = _network(neighbours + 3, neighbours, neighbours)
        self.similarity = nn.Parameter(torch.zeros(()))
        self.distance_sigma = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        enlarged = F.interpolate(x, guidance.shape[2:], mode="bicubic", align_corners=False)
        padded = F.pad(enlarged, (self.radius,) * 4, mode="reflect")
        return unfold_conv(padded, self.kernels(guidance))

    def kernels(self, guidance: Tensor) -> Tensor:
        keys, side = self.keys(guidance), 2 * self.radius + 1
        padded = F.pad(keys, (self.radius,) * 4, mode="reflect")
        neighbours = F.unfold(padded, side).unflatten(1, (keys.shape[1], side * side))
        products = torch.einsum("bcop,bcp->bop", neighbours, keys.flatten(2)).unflatten(2, keys.shape[2:])
        similarities = (products * self.similarity.exp().clamp(1e-4, 1e4)).softmax(1)
        steps = torch.linspace(-1, 1, side) ** 2
        distances = torch.exp(-(steps[:, None] + steps) / (2 * self.distance_sigma**2)).view(1, -1, 1, 1)
        kernels = similarities * distances
        kernels = kernels / kernels.sum(1, keepdim=True).clamp(min=1e-7)
        return kernels + 0.1 * self.correction(torch.cat([kernels, guidance], 1))


class PeerCorrection(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(dim, dim), nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * F.conv2d(self.dropout(x), self.linear.weight[:, :, None, None], self.linear.bias)


class PeerPyramid(nn.Module):
    """Stages one behind the other, and the correction of the last map."""

    def __init__(self, dim: int, num_stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(PeerStage() for _ in range(num_stages))
        self.corrections = nn.ModuleList([PeerCorrection(dim)])

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return self.levels(x, image)[-1]

    def levels(self, x: Tensor, image: Tensor) -> list[Tensor]:
        """The map of every stage, the last one corrected."""
        levels = []
        for stage in self.stages:
            guidance = F.adaptive_avg_pool2d(image, (2 * x.shape[2], 2 * x.shape[3]))
            x = stage(x, guidance)
            levels.append(x)
        return [*levels[:-1], self.corrections[0](x)]


def _network(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_dim, hidden_dim, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(hidden_dim, out_dim, 1)
    )
