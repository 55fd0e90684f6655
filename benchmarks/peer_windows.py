"""A straightforward window attention of LLaVA-UHD v2, the peer of the benchmark: what a reader of its
released code would write with torch and torchvision.

Every cell of every level is projected and normed, keys and values go through RoIAlign, and four passes share
one attention. It has the very parameters of our module. Letters: B views, C and D widths, (H, W) a level's
grid, n windows, k bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from stepwell.fuse.windows import WindowAttention


class PeerWindows(nn.Module):
    def __init__(self, ours: WindowAttention) -> None:
        super().__init__()
        self.grid, self.levels, self.bins = ours.config.grid, ours.levels, ours.bins
        self.projectors, self.embeddings = ours.projections, ours.level_codes
        self.pos_embed, self.queries = ours.position, ours.queries
        self.ln_q, self.ln_kv, self.ln_proj, self.ln_post = (
            *(ours.query_norm, ours.norm),
            *(ours.set_norm, ours.out_norm),
        )
        with torch.device("meta"):
            self.attn = nn.MultiheadAttention(len(ours.mix.weight), ours.num_heads)
        self.attn.in_proj_weight, self.attn.in_proj_bias = ours.qkv.weight, ours.qkv.bias
        self.attn.out_proj.weight, self.attn.out_proj.bias = ours.mix.weight, ours.mix.bias
        self.cat_proj, self.proj = ours.join, ours.out

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C, H, W) of all levels -> (B, n, D)."""
        view = tuple(side >> self.levels[0] for side in maps[0].shape[-2:])
        keys, values = [], []
        for x, level, projector, embedding in zip(
            maps, self.levels, self.projectors, self.embeddings, strict=True
        ):
            x = self.ln_kv(projector(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (B, D, H, W)
            place = self.pos_embed.t().reshape(1, -1, *self.grid)
            place = F.interpolate(place, x.shape[-2:], mode="bicubic", align_corners=False)
            keys.append(self._windows(x + place + embedding.view(1, -1, 1, 1), self.bins(view, level)))
            values.append(self._windows(x, self.bins(view, level)))
        key, value = torch.cat(keys, 1).transpose(0, 1), torch.cat(values, 1).transpose(0, 1)  # (k, B*n, D)
        sets = []
        for query in self.queries:
            q = (self.ln_q(query) + self.pos_embed).repeat(len(maps[0]), 1)[None]
            sets.append(self.ln_proj(self.attn(q, key, value, need_weights=False)[0][0]))
        out = self.proj(self.ln_post(self.cat_proj(torch.cat(sets, -1))))
        return out.view(len(maps[0]), -1, out.shape[-1])

    def _windows(self, x: Tensor, bins: tuple[int, int]) -> Tensor:
        """(B, D, H, W) -> (B*n, k, D)."""
        (rows, cols), (height, width) = self.grid, x.shape[-2:]
        boxes = x.new_tensor(
            [
                (j * width / cols, i * height / rows, (j + 1) * width / cols, (i + 1) * height / rows)
                for i in range(rows)
                for j in range(cols)
            ]
        )
        pooled = roi_align(x, [boxes] * len(x), bins, sampling_ratio=-1, aligned=False)
        return pooled.flatten(2).transpose(1, 2)
