"""A straightforward PIIP detection backbone, the peer of the benchmark: what a reader of the paper would
write.

Explicit softmax attention, windows cut and joined by copies, grid_sample for deformable attention,
contiguous NCHW maps. Parameters carry the released names, so that the benchmark loads one set of weights
into both and compares outputs. Letters: B batch, N tokens, C width, (H, W) grid, w window.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, self.window = heads, window

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        (H, W), w = size, self.window
        x = F.pad(x.view(B, H, W, C), (0, 0, 0, -W % w, 0, -H % w))
        rows, cols = x.shape[1] // w, x.shape[2] // w
        x = x.view(B, rows, w, cols, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = self.proj(x.transpose(1, 2).reshape(-1, w * w, C))
        x = x.view(B, rows, cols, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, rows * w, cols * w, C)
        return x[:, :H, :W].reshape(B, N, C)


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, window), Mlp(dim)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), size)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 16, stride=16)


class Branch(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, window: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 14 * 14, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, window) for _ in range(depth))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed.proj(image)
        size = (x.shape[2], x.shape[3])
        pos = self.pos_embed.reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        pos = F.interpolate(pos, size, mode="bicubic", align_corners=False)
        return (x + pos).flatten(2).transpose(1, 2).contiguous(), size


class DeformAttention(nn.Module):
    def __init__(self, dim: int, heads: int = 16, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(dim, heads * points * 2)
        self.attention_weights = nn.Linear(dim, heads * points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)

    def forward(self, q: Tensor, size: tuple[int, int], x: Tensor, key: tuple[int, int]) -> Tensor:
        B, N, _ = q.shape
        offsets = self.sampling_offsets(q).view(B, N, self.heads, self.points, 2)
        weights = self.attention_weights(q).view(B, N, self.heads, self.points).softmax(-1)
        ys, xs = ((torch.arange(n, device=q.device) + 0.5) / n for n in size)
        centre = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).view(1, N, 1, 1, 2)
        where = centre + offsets / torch.tensor([key[1], key[0]], device=q.device)
        maps = self.value_proj(x).view(B, -1, self.heads, q.shape[-1] // 2 // self.heads)
        maps = maps.permute(0, 2, 3, 1).reshape(B * self.heads, -1, *key).float()
        grid = (2 * where - 1).transpose(1, 2).flatten(0, 1).float()
        read = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = weights.transpose(1, 2).reshape(B * self.heads, 1, N, self.points)
        out = (read * weights).sum(-1).view(B, -1, N).transpose(1, 2)
        return self.output_proj(out.to(q.dtype))


class DepthwiseConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class ConvFFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)
        self.dwconv = DepthwiseConv(dim // 4)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.fc1(x)
        x = self.dwconv.dwconv(x.transpose(1, 2).reshape(x.shape[0], -1, *size)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(x))


class Injector(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ffn = DeformAttention(dim), ConvFFN(dim)
        self.ca_gamma = nn.Parameter(torch.full((dim,), 0.1))
        self.cffn_gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, q: Tensor, size: tuple[int, int], x: Tensor, key: tuple[int, int]) -> Tensor:
        q = q + self.ca_gamma * self.attn(self.query_norm(q), size, self.feat_norm(x), key)
        return q + self.cffn_gamma * self.ffn(self.ffn_norm(q), size)


class Unit(nn.Module):
    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.branch2to1_proj, self.branch1to2_proj = nn.Linear(fine, coarse), nn.Linear(coarse, fine)
        self.branch2to1_injector, self.branch1to2_injector = Injector(coarse), Injector(fine)


class PeerPiip(nn.Module):
    """dims, heads and sides of the branches, largest network first; windows of 14 tokens; depth 12; dense
    merging."""

    def __init__(
        self, dims: tuple[int, ...], heads: tuple[int, ...], sides: tuple[int, ...], depth: int = 12
    ) -> None:
        super().__init__()
        self.sides, self.depth = sides, depth
        for i, (dim, head) in enumerate(zip(dims, heads, strict=True), 1):
            self.add_module(f"branch{i}", Branch(dim, depth, head, 14))
            self.add_module(f"merge_branch{i}", _merge(dim, dims[0]))
            self.register_parameter(f"w{i}", nn.Parameter(torch.tensor(1.0)))
        pairs = list(pairwise(dims))
        self.interactions = nn.ModuleList(
            nn.ModuleDict({f"interaction_units_{i}{i + 1}": Unit(a, b) for i, (a, b) in enumerate(pairs, 1)})
            for _ in range(depth)
        )
        dim = dims[0]
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.GroupNorm(32, dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps at strides 4, 8, 16, 32."""
        branches = [self.get_submodule(f"branch{i}") for i in range(1, len(self.sides) + 1)]
        states = []
        for side, branch in zip(self.sides, branches, strict=True):
            scale = side / self.sides[-1]
            view = image if scale == 1 else F.interpolate(image, scale_factor=scale, mode="bilinear")
            states.append(branch.embed(view))
        for layer in range(self.depth):
            states = [(b.blocks[layer](x, size), size) for b, (x, size) in zip(branches, states, strict=True)]
            for i in range(len(branches) - 1, 0, -1):
                unit = self.interactions[layer][f"interaction_units_{i}{i + 1}"]
                (a, a_size), (b, b_size) = states[i - 1], states[i]
                to_a, to_b = unit.branch2to1_proj(b), unit.branch1to2_proj(a)
                states[i - 1] = (unit.branch2to1_injector(a, a_size, to_a, b_size), a_size)
                states[i] = (unit.branch1to2_injector(b, b_size, to_b, a_size), b_size)
        target = states[-1][1]
        merged: Tensor | float = 0.0
        for i, (x, size) in enumerate(states, 1):
            x = x.transpose(1, 2).reshape(x.shape[0], -1, *size).contiguous()
            x = self.get_submodule(f"merge_branch{i}")(x)
            x = x if size == target else F.interpolate(x.float(), target, mode="bilinear").to(x.dtype)
            merged = merged + self.get_parameter(f"w{i}") * x
        return [self.fpn1(merged), self.fpn2(merged), merged, F.max_pool2d(merged, 2)]


def _merge(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, out, 3, padding=1, bias=False),
        nn.GroupNorm(32, out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.GroupNorm(32, out),
        nn.ReLU(),
    )
