"""A straightforward PIIP-LLaVA tower, CLIP-L beside ConvNeXt-B: the peer of the benchmark, written to be
read.

Explicit softmax attention, contiguous NCHW maps, grid_sample. Parameters carry the released names.
Letters: B batch, N tokens, C width, (H, W) grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peer_piip import Mlp, Unit
from torch import Tensor, nn

State = tuple[Tensor, tuple[int, int]]


class ClipAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        projected = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.view(B, N, self.heads, -1).transpose(1, 2) for t in projected)
        x = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out_proj(x.transpose(1, 2).reshape(B, N, C))


class QuickMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class ClipLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = ClipAttention(dim, heads), QuickMlp(dim)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Clip(nn.Module):
    def __init__(self, dim: int = 1024, depth: int = 24, heads: int = 16, grid: int = 21) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(dim) * 0.02)
        self.embeddings.patch_embedding = nn.Conv2d(3, dim, 16, stride=16, bias=False)
        self.embeddings.position_embedding = nn.Embedding(grid * grid + 1, dim)
        self.pre_layrnorm = nn.LayerNorm(dim)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ClipLayer(dim, heads) for _ in range(depth))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.embeddings.patch_embedding(image)
        size = (x.shape[2], x.shape[3])
        first = self.embeddings.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x.flatten(2).transpose(1, 2)], 1) + self.embeddings.position_embedding.weight
        return self.pre_layrnorm(x), size


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)
        self.weight = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))) * self.weight
        return x + y.permute(0, 3, 1, 2).contiguous()


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class ConvNext(nn.Module):
    def __init__(
        self, dims: tuple[int, ...] = (128, 256, 512, 1024), depths: tuple[int, ...] = (3, 3, 27, 3)
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelNorm(dims[0], eps=1e-6))
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            stage = nn.Module()
            if i:
                down = nn.Conv2d(dims[i - 1], dim, 2, stride=2)
                stage.downsample = nn.Sequential(ChannelNorm(dims[i - 1], eps=1e-6), down)
            stage.blocks = nn.ModuleList(ConvNextBlock(dim) for _ in range(depth))
            self.stages.append(stage)

    def layers(self) -> list[nn.Module]:
        """The flat list: a downsampling is a layer of its own."""
        return [
            layer
            for stage in self.stages
            for layer in ([stage.downsample] if hasattr(stage, "downsample") else []) + list(stage.blocks)
        ]


class PeerLlava(nn.Module):
    """runs: the layers of both branches before each interaction; side: of CLIP's view of any image."""

    def __init__(self, runs: list[list[tuple[int, int]]], side: int = 336) -> None:
        super().__init__()
        self.runs, self.side = runs, side
        self.branch1, self.branch2 = nn.Module(), nn.Module()
        self.branch1.clip_model, self.branch2.convnext_model = Clip(), ConvNext()
        widths = [
            layer.weight.numel() if isinstance(layer, ConvNextBlock) else 0
            for layer in self.convnext().layers()
        ]
        self.interactions = nn.ModuleList(
            nn.ModuleDict({"interaction_units_12": Unit(1024, widths[last])}) for _, last in runs[1]
        )

    def convnext(self) -> ConvNext:
        return self.branch2.convnext_model

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps of both branches."""
        clip, convnext = self.branch1.clip_model, self.convnext()
        x, a_size = clip.embed(
            F.interpolate(image, scale_factor=self.side / image.shape[-1], mode="bilinear")
        )
        y, layers = convnext.stem(image), convnext.layers()
        for (first, last), (start, stop), interaction in zip(*self.runs, self.interactions, strict=True):
            for i in range(first, last + 1):
                x = clip.encoder.layers[i](x)
            for i in range(start, stop + 1):
                y = layers[i](y)
            unit, b_size = interaction["interaction_units_12"], (y.shape[2], y.shape[3])
            head, a, b = x[:, :1], x[:, 1:], y.flatten(2).transpose(1, 2)
            to_a, to_b = unit.branch2to1_proj(b), unit.branch1to2_proj(a)
            a = unit.branch2to1_injector(a, a_size, to_a, b_size)
            b = unit.branch1to2_injector(b, b_size, to_b, a_size)
            x, y = torch.cat([head, a], 1), b.transpose(1, 2).reshape(y.shape).contiguous()
        return [x[:, 1:].transpose(1, 2).unflatten(2, a_size), y]
