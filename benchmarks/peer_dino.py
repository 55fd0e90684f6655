"""Straightforward DINO heads, the peer of the benchmark: what a reader of the official code would write.

Deformable attention is transformers' (grid_sample, level by level), self-attention torch's own layer, which
hands out its weights as the official code lets it; matching and losses are in peer_matching.py.
Parameters carry the released names. Layers run in the precision of their parameters; sampling, boxes, scores
and losses in single precision.
Letters: B batch, C width, L levels, N tokens of all levels, Q queries, D denoising queries, n objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peer_matching import Prediction, denoised, layer_losses, matched
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from stepwell.structures import Extent, FoundObjects, Objects

POINTS, NUM_DENOISING, NUM_FOUND = 4, 100, 300


class ConvNorm(nn.Module):
    def __init__(self, dim: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, bias=False)
        self.gn = nn.GroupNorm(32, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x))


class Neck(nn.Module):
    def __init__(self, dims: Sequence[int], out: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(dim, out, 1, 1) for dim in dims)
        self.extra_convs = nn.ModuleList([ConvNorm(dims[-1], out, 3, 2)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return [*levels, self.extra_convs[0](maps[-1])]


class DeformAttention(nn.Module):
    def __init__(self, dim: int, heads: int, levels: int) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        self.sampling_offsets = nn.Linear(dim, heads * levels * POINTS * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * POINTS)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sample = MultiScaleDeformableAttention()

    def forward(
        self, x: Tensor, pos: Tensor, memory: Tensor, padding: Tensor, reference: Tensor, sizes: Tensor
    ) -> Tensor:
        """x, pos (B, Q, C), memory (B, N, C), padding (B, N), reference (B, Q, L, 2 or 4) -> (B, Q, C)."""
        B, Q, C = x.shape
        query = x + pos
        value = self.value_proj(memory).masked_fill(padding[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(B, Q, self.heads, self.levels, POINTS, 2).float()
        weights = self.attention_weights(query).view(B, Q, self.heads, -1).float().softmax(-1)
        if reference.shape[-1] == 2:
            offsets = offsets / sizes.flip(-1)[:, None]
        else:
            offsets = offsets / POINTS * reference[:, :, None, :, None, 2:] * 0.5
        where = reference[:, :, None, :, None, :2] + offsets
        out = self.sample(
            value.view(B, -1, self.heads, C // self.heads).float(),
            sizes,
            [tuple(size) for size in sizes.tolist()],
            None,
            where,
            weights.view(B, Q, self.heads, self.levels, POINTS),
            64,
        )
        return x + self.output_proj(out.to(x.dtype))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        query = x + pos
        return x + self.attn(query, query, x, attn_mask=mask)[0]


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.ReLU()), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, levels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([DeformAttention(dim, heads, levels)])
        self.ffns = nn.ModuleList([FeedForward(dim, hidden)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor, reference: Tensor, sizes: Tensor) -> Tensor:
        x = self.norms[0](self.attentions[0](x, pos, x, padding, reference, sizes))
        return self.norms[1](self.ffns[0](x))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, levels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(dim, heads), DeformAttention(dim, heads, levels)])
        self.ffns = nn.ModuleList([FeedForward(dim, hidden)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        padding: Tensor,
        reference: Tensor,
        sizes: Tensor,
    ) -> Tensor:
        x = self.norms[0](self.attentions[0](x, pos, mask))
        x = self.norms[1](self.attentions[1](x, pos, memory, padding, reference, sizes))
        return self.norms[2](self.ffns[0](x))


class Encoder(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, levels: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, hidden, heads, levels) for _ in range(depth))


class Decoder(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, levels: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, hidden, heads, levels) for _ in range(depth))
        self.ref_point_head = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)


class Transformer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, levels: int, depth: int, num_queries: int) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(dim, hidden, heads, levels, depth)
        self.decoder = Decoder(dim, hidden, heads, levels, depth)
        self.enc_output, self.enc_output_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.level_embeds = nn.Parameter(torch.randn(levels, dim))
        self.query_embed = nn.Embedding(num_queries, dim)

    def encode(self, levels: Sequence[Tensor], paddings: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """levels (B, C, h, w), paddings (B, h, w) -> memory (B, N, C), padding (B, N), sizes (L, 2) and the
        valid shares of the axes, x first (B, L, 2)."""
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)
        positions = [
            _grid_code(padding, self.dim // 2).flatten(1, 2).to(tokens.dtype) + embed
            for padding, embed in zip(paddings, self.level_embeds, strict=True)
        ]
        padding = torch.cat([x.flatten(1) for x in paddings], 1)
        sizes = torch.tensor([x.shape[-2:] for x in levels])
        shares = torch.stack([_valid_cells(x) / torch.tensor([x.shape[2], x.shape[1]]) for x in paddings], 1)
        centres = torch.cat([_centres(x) / _valid_cells(x)[:, None] for x in paddings], 1)
        reference = centres[:, :, None] * shares[:, None]
        for layer in self.encoder.layers:
            tokens = layer(tokens, torch.cat(positions, 1), padding, reference, sizes)
        return tokens, padding, sizes, shares

    def proposals(self, memory: Tensor, paddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Memory that proposes (B, N, C), and the logits of its boxes (B, N, 4)."""
        boxes = []
        for i, padding in enumerate(paddings):
            centres = _centres(padding) / _valid_cells(padding)[:, None]
            boxes.append(torch.cat([centres, torch.full_like(centres, 0.05 * 2**i)], -1))
        joined = torch.cat(boxes, 1)
        valid = ((joined > 0.01) & (joined < 0.99)).all(-1, keepdim=True)
        valid &= ~torch.cat([x.flatten(1) for x in paddings], 1)[..., None]
        logits = (joined / (1 - joined)).log().masked_fill(~valid, torch.inf)
        return self.enc_output_norm(self.enc_output(memory.masked_fill(~valid, 0.0))), logits


class Head(nn.Module):
    def __init__(
        self, dim: int, hidden: int, heads: int, levels: int, depth: int, num_queries: int, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.transformer = Transformer(dim, hidden, heads, levels, depth, num_queries)
        self.cls_branches = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(depth + 1))
        self.reg_branches = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
            for _ in range(depth + 1)
        )
        self.label_embedding = nn.Embedding(num_classes, dim)

    def forward(
        self, levels: Sequence[Tensor], paddings: Sequence[Tensor], denoising: tuple[Tensor, ...] | None
    ) -> tuple[Prediction, list[Prediction]]:
        """What the encoder proposes, and what every layer of the decoder predicts, denoising queries first.
        denoising: their contents (B, D, C), boxes as logits (B, D, 4) and the attention mask."""
        transformer = self.transformer
        memory, padding, sizes, shares = transformer.encode(levels, paddings)
        proposing, logits = transformer.proposals(memory, paddings)
        classes = self.cls_branches[-1](proposing).float()
        logits = logits + self.reg_branches[-1](proposing).float()
        best = classes.max(-1).values.topk(self.num_queries, 1).indices[..., None]
        classes, logits = (x.gather(1, best.expand(-1, -1, x.shape[-1])) for x in (classes, logits))
        x, mask = transformer.query_embed.weight.expand(len(memory), -1, -1), None
        reference = logits.detach()
        if denoising is not None:
            contents, boxes, mask = denoising
            x, reference = torch.cat([contents, x], 1), torch.cat([boxes, reference], 1)
        reference = reference.sigmoid()
        layers: list[Prediction] = []
        undetached = reference
        for layer, cls, reg in zip(
            transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=False
        ):
            where = reference[:, :, None] * torch.cat([shares, shares], -1)[:, None]
            code = _box_code(where[:, :, 0], transformer.dim // 2).to(x.dtype)
            pos = transformer.decoder.ref_point_head(code)
            x = layer(x, pos, mask, memory, padding, where, sizes)
            state = transformer.decoder.norm(x)
            boxes = (reg(state).float() + _logit(undetached)).sigmoid()
            layers.append((cls(state).float(), boxes))
            undetached = (reg(x).float() + _logit(reference)).sigmoid()
            reference = undetached.detach()
        return (classes, logits.sigmoid()), layers

    def noisy(self, objects: Sequence[Objects], scales: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Denoising queries: contents, boxes as logits, the attention mask (True: not seen), and groups.
        scales (B, 4): width and height of the image, twice."""
        most = max(1, *(len(x.labels) for x in objects))
        groups = max(1, NUM_DENOISING // most)
        weight = self.label_embedding.weight
        contents = weight.new_zeros(len(objects), groups, 2, most, weight.shape[1])
        boxes = torch.zeros(len(objects), groups, 2, most, 4)
        for i, (image, scale) in enumerate(zip(objects, scales, strict=True)):
            n = len(image.labels)
            labels = image.labels.expand(groups, 2, n)
            wrong = torch.randint_like(labels, self.num_classes)
            contents[i, :, :, :n] = self.label_embedding(
                torch.where(torch.rand(groups, 2, n) < 0.25, wrong, labels)
            )
            corners = image.boxes / scale
            half = (corners[:, 2:] - corners[:, :2]).repeat(1, 2) / 2
            part = torch.rand(groups, 2, n, 4) + torch.tensor([0.0, 1.0])[:, None, None]
            moved = corners + (2 * torch.randint(2, part.shape) - 1) * part * half
            boxes[i, :, :, :n] = _logit(box_convert(moved.clamp(0, 1), "xyxy", "cxcywh"))
        count = groups * 2 * most
        group = torch.arange(count) // (2 * most)
        mask = torch.zeros(count + self.num_queries, count + self.num_queries, dtype=torch.bool)
        mask[count:, :count] = True
        mask[:count, :count] = group[:, None] != group
        return contents.flatten(1, 3), boxes.flatten(1, 3), mask, groups


class PeerDino(nn.Module):
    """dims: widths of the maps, finest first; one level more is made of the last. Official: width 256,
    hidden 2048."""

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int = 80,
        *,
        width: int = 256,
        hidden: int = 2048,
        heads: int = 8,
        depth: int = 6,
        num_queries: int = 900,
    ) -> None:
        super().__init__()
        self.neck = Neck(dims, width)
        self.bbox_head = Head(width, hidden, heads, len(dims) + 1, depth, num_queries, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the official code starts, but for boxes that move from layer to layer and cells that read what
        is in them, as in a network that has learnt."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformAttention):
                angles = torch.arange(module.heads) * (2 * math.pi / module.heads)
                ways = torch.stack([angles.cos(), angles.sin()], -1)
                ways = ways / ways.abs().max(-1, keepdim=True).values
                steps = torch.arange(1.0, POINTS + 1)[:, None] * ways[:, None, None]
                module.sampling_offsets.bias.data = steps.repeat(1, module.levels, 1, 1).flatten()
        for branch in self.bbox_head.cls_branches:
            nn.init.constant_(branch.bias, -math.log(99))
        nn.init.zeros_(self.bbox_head.transformer.enc_output.bias)  # cells that must not propose come last
        for table in (self.bbox_head.transformer.query_embed, self.bbox_head.label_embedding):
            nn.init.normal_(table.weight)
        nn.init.normal_(self.bbox_head.transformer.level_embeds)

    def detect(self, maps: Sequence[Tensor], extents: Sequence[Extent]) -> list[FoundObjects]:
        levels = self.neck(maps)
        _, layers = self.bbox_head(levels, _paddings(levels, extents), None)
        found = []
        for classes, boxes, extent in zip(*layers[-1], extents, strict=True):
            scores, places = classes.sigmoid().flatten().topk(NUM_FOUND)
            height, width = extent.valid
            corners = box_convert(boxes[places // classes.shape[-1]], "cxcywh", "xyxy")
            corners = clip_boxes_to_image(corners * _scale(extent), (height, width))
            found.append(FoundObjects(corners, scores, places % classes.shape[-1]))
        return found

    def losses(
        self, maps: Sequence[Tensor], extents: Sequence[Extent], objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        levels = self.neck(maps)
        scales = torch.stack([_scale(extent) for extent in extents])
        contents, boxes, mask, groups = self.bbox_head.noisy(objects, scales)
        first, layers = self.bbox_head(levels, _paddings(levels, extents), (contents, boxes, mask))
        count = contents.shape[1]
        losses = layer_losses("encoder", first, scales, objects, matched(first, scales, objects))
        for i, (classes, places) in enumerate(layers):
            own, noisy = (classes[:, count:], places[:, count:]), (classes[:, :count], places[:, :count])
            losses |= layer_losses(f"layer{i}", own, scales, objects, matched(own, scales, objects))
            pairs = denoised(objects, groups, count)
            losses |= layer_losses(f"denoising{i}", noisy, scales, objects, pairs)
        return losses


def _paddings(levels: Sequence[Tensor], extents: Sequence[Extent]) -> list[Tensor]:
    """(B, h, w) of every level: True outside the image."""
    height, width = (max(extent.padded[i] for extent in extents) for i in range(2))
    whole = torch.ones(len(extents), 1, height, width)
    for image, extent in zip(whole, extents, strict=True):
        image[:, : extent.valid[0], : extent.valid[1]] = 0
    return [F.interpolate(whole, x.shape[-2:])[:, 0].bool() for x in levels]


def _scale(extent: Extent) -> Tensor:
    height, width = extent.valid
    return torch.tensor([width, height, width, height], dtype=torch.float32)


def _valid_cells(padding: Tensor) -> Tensor:
    """(B, h, w) -> (B, 2): columns and rows."""
    return torch.stack([(~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)], -1)


def _centres(padding: Tensor) -> Tensor:
    """(B, h, w) -> (B, h*w, 2), in cells, x first."""
    batch, height, width = padding.shape
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([xs, ys], -1).flatten(0, 1).expand(batch, -1, -1)


def _grid_code(padding: Tensor, features: int) -> Tensor:
    """(B, h, w) -> (B, h, w, 2*features), of rows and then of columns."""
    inside = (~padding).float()
    ys, xs = inside.cumsum(1), inside.cumsum(2)
    ys, xs = ys / (ys[:, -1:] + 1e-6), xs / (xs[:, :, -1:] + 1e-6)
    return torch.cat([_sine(ys, features, 20), _sine(xs, features, 20)], -1)


def _box_code(boxes: Tensor, features: int) -> Tensor:
    """(B, Q, 4) -> (B, Q, 4*features), in the order y, x, w, h."""
    return torch.cat([_sine(boxes[..., i], features, 10000) for i in (1, 0, 2, 3)], -1)


def _sine(x: Tensor, features: int, temperature: float) -> Tensor:
    """(...) -> (..., features): sine and cosine in turn."""
    steps = temperature ** (2 * torch.arange(features // 2) / features)
    angles = 2 * math.pi * x[..., None] / steps
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _logit(x: Tensor) -> Tensor:
    return (x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3)).log()
