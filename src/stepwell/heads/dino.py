"""DINO: a transformer that finds objects among the cells of all levels, without anchors and without NMS.

DINO, arXiv 2203.03605: boxes start where the encoder sees objects, and their contents are learned (mixed
selection); every layer of the decoder moves them, and learns from what the layer before has moved (look
forward twice); denoising beside the matching. PIIP (arXiv 2501.07783) trains it in this form.
Letters: B batch, N cells of all levels, one after the other, D width, Nq queries, S slots of denoising, K
classes. Boxes are centre and size in parts of the valid image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.heads.channel_mapper import ChannelMapper
from stepwell.heads.detection import DetectionHead
from stepwell.heads.dino_denoising import DenoisingConfig, Draws, NoisyObjects, draw, hidden_queries, spoil
from stepwell.heads.dino_layers import CellLayer, LevelAttention, QueryLayer
from stepwell.heads.dino_matching import MatchConfig, SetLossConfig, Targets, assign, set_losses, to_corners
from stepwell.heads.dino_positions import (
    Grids,
    box_logits,
    box_sines,
    cell_proposals,
    cell_references,
    grids_of,
    map_sines,
)
from stepwell.layers.linear import Linear
from stepwell.ops.boxes import clip_boxes
from stepwell.ops.precision import at_least_single
from stepwell.structures import Detections, Extent, Objects

__all__ = ["Decoded", "Dino", "DinoConfig", "Encoded"]

Count = Annotated[int, Field(gt=0)]
EPS = 1e-3
"""Of `box_logits`, wherever boxes are moved."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DinoConfig:
    """The defaults are those of PIIP's three configurations.

    num_levels: maps that the transformer sees; those that a backbone lacks are made from its coarsest. dim:
    a multiple of the heads, of `norm_groups` and of 4. encoder_heads: of deformable attention, everywhere;
    query_heads: of the queries' self-attention. map_temperature, box_temperature: of the sines.
    """

    kind: Literal["dino"] = "dino"
    dim: Count = 256
    num_levels: Count = 4
    num_queries: Count = 900
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    ffn_dim: Count = 2048
    deformable_heads: Count = 8
    query_heads: Count = 8
    num_points: Count = 4
    norm_groups: Count = 32
    norm_eps: float = 1e-5
    map_temperature: float = 20.0
    box_temperature: float = 10000.0
    denoising: DenoisingConfig = DenoisingConfig()
    matching: MatchConfig = MatchConfig()
    losses: SetLossConfig = SetLossConfig()
    max_detections: Count = 300

    def build(self, dims: Sequence[int], strides: Sequence[float], num_classes: int) -> Dino:
        """The head with random weights. dims: of the backbone's maps, finest first, at most `num_levels`.

        Raises ValueError for more maps than levels, and for a width that does not divide.
        """
        if not 1 <= len(dims) <= self.num_levels:
            raise ValueError(
                f"DINO of {self.num_levels} levels takes 1 to {self.num_levels} maps, got {len(dims)}; "
                "leave the finest ones out of the backbone's"
            )
        for part in (self.norm_groups, self.query_heads, self.deformable_heads, 4):
            if self.dim % part:
                raise ValueError(f"dim {self.dim} of DINO is a multiple of {part}, or change that")
        return Dino(dims, num_classes, self)


class Encoded(NamedTuple):
    """What the encoder makes of the maps, and what it proposes, best first."""

    memory: Tensor  # (B, N, D)
    grids: Grids
    logits: Tensor  # (B, Nq, K)
    box_logits: Tensor  # (B, Nq, 4)


class Decoded(NamedTuple):
    """What every layer of the decoder says, and whence its boxes came."""

    states: list[Tensor]  # (B, S + Nq, D), normed
    references: list[Tensor]  # (B, S + Nq, 4): those it starts with, and after each layer
    logits: list[Tensor]  # (B, S + Nq, K)
    boxes: list[Tensor]  # (B, S + Nq, 4)


class Dino(DetectionHead):
    """As its settings say; see `DinoConfig.build`."""

    def __init__(self, dims: Sequence[int], num_classes: int, config: DinoConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        dim, layers = config.dim, config.decoder_layers
        self.neck = ChannelMapper(
            dims, dim, num_extra=config.num_levels - len(dims), num_groups=config.norm_groups
        )
        shape = {
            "num_heads": config.deformable_heads,
            "num_levels": config.num_levels,
            "num_points": config.num_points,
            "ffn_dim": config.ffn_dim,
        }
        cell_layer = partial(CellLayer, dim, norm_eps=config.norm_eps, **shape)
        query_layer = partial(
            QueryLayer, dim, self_heads=config.query_heads, norm_eps=config.norm_eps, **shape
        )
        self.levels = nn.Parameter(torch.empty(config.num_levels, dim))
        self.encoder = nn.ModuleList(cell_layer() for _ in range(config.encoder_layers))
        self.memory = nn.Sequential(Linear(dim, dim), nn.LayerNorm(dim, eps=config.norm_eps))
        self.contents = nn.Embedding(config.num_queries, dim)
        self.places = nn.Sequential(Linear(2 * dim, dim), nn.ReLU(), Linear(dim, dim))
        self.decoder = nn.ModuleList(query_layer() for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.classifiers = nn.ModuleList(Linear(dim, num_classes) for _ in range(layers + 1))
        self.regressors = nn.ModuleList(_regressor(dim) for _ in range(layers + 1))
        self.noisy_labels = nn.Embedding(num_classes, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices Xavier uniform, boxes that do not move yet, classes of probability 0.01."""
        for part in (self.encoder, self.decoder, self.memory, self.places):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, LevelAttention):
                module.reset_parameters()
        nn.init.normal_(self.levels)
        for classifier in self.classifiers:
            nn.init.constant_(cast(Linear, classifier).bias, -torch.tensor(99.0).log().item())
        for regressor in self.regressors:
            last = cast(nn.Sequential, regressor)[-1]
            nn.init.zeros_(cast(Tensor, last.weight))
            nn.init.zeros_(cast(Tensor, last.bias))

    def losses(
        self,
        maps: Sequence[Tensor],
        extents: Sequence[Extent],
        objects: Sequence[Objects],
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        """ "encoder", "layer0" and so on and "denoising0" and so on, each with _classes, _boxes and _giou.

        draws: of the denoising, by default at random.
        """
        encoded = self.encode(maps, extents)
        labels = [image.labels for image in objects]
        sizes = [extent.valid for extent in extents]
        boxes = [_to_parts(image.boxes, size) for image, size in zip(objects, sizes, strict=True)]
        noisy = self.noisy(labels, boxes, draws)
        decoded = self.decode(encoded, noisy)
        slots = noisy.labels.shape[1]

        sets = {"encoder": (encoded.logits, encoded.box_logits.sigmoid())}
        for i, pair in enumerate(zip(decoded.logits, decoded.boxes, strict=True)):
            sets[f"layer{i}"] = (pair[0][:, slots:], pair[1][:, slots:])
        losses: dict[str, Tensor] = {}
        count = _mean_over_processes(encoded.memory.new_tensor(float(sum(map(len, labels)))))
        for name, (logits, found) in sets.items():
            targets = [
                self._matched(*image) for image in zip(logits, found, labels, boxes, sizes, strict=True)
            ]
            losses |= self._named(name, set_losses(logits, found, targets, sizes, count, self.config.losses))
        targets = [self._denoised(*image, noisy) for image in zip(labels, boxes, strict=True)]
        count = _mean_over_processes(encoded.memory.new_tensor(float(sum(map(len, labels)) * noisy.groups)))
        for i, (logits, found) in enumerate(zip(decoded.logits, decoded.boxes, strict=True)):
            terms = set_losses(logits[:, :slots], found[:, :slots], targets, sizes, count, self.config.losses)
            losses |= self._named(f"denoising{i}", terms)
        return losses

    def detect(self, maps: Sequence[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        """The best `max_detections` of all queries and classes."""
        decoded = self.decode(self.encode(maps, extents))
        found = []
        for logits, boxes, extent in zip(decoded.logits[-1], decoded.boxes[-1], extents, strict=True):
            found.append(self.best(logits, boxes, extent))
        return found

    def best(self, logits: Tensor, boxes: Tensor, extent: Extent) -> Detections:
        """logits (Nq, K), boxes (Nq, 4) of an image -> its detections."""
        scores = logits.sigmoid().flatten()
        scores, index = scores.topk(min(self.config.max_detections, len(scores)))
        corners = to_corners(boxes[index // self.num_classes], extent.valid)
        return Detections(clip_boxes(corners, extent.valid), scores, index % self.num_classes)

    def encode(self, maps: Sequence[Tensor], extents: Sequence[Extent]) -> Encoded:
        """maps: (B, C, h, w), finest first."""
        maps = self.neck([x.to(self.levels.dtype) for x in maps])
        grids = grids_of(maps, extents)
        cells = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        lengths = torch.tensor([x.shape[-2] * x.shape[-1] for x in maps], device=cells.device)
        places = map_sines(grids, self.config.dim, temperature=self.config.map_temperature).to(cells.dtype)
        places = places + self.levels.repeat_interleave(lengths, 0)
        references = cell_references(grids)
        for layer in self.encoder:
            cells = layer(cells, places, references, grids.sizes, grids.padding)
        return self._propose(cells, grids)

    def _propose(self, cells: Tensor, grids: Grids) -> Encoded:
        proposals = cell_proposals(grids)
        unfit = proposals.isinf().any(-1, keepdim=True)
        seen = self.memory(cells.masked_fill(unfit, 0))
        exact = at_least_single(seen.dtype)
        logits = self.classifiers[-1](seen).to(exact)
        count = min(self.config.num_queries, logits.shape[1])
        index = logits.max(-1).values.topk(count, 1).indices[..., None]
        chosen = seen.gather(1, index.expand(-1, -1, seen.shape[-1]))
        boxes = self.regressors[-1](chosen).to(exact) + proposals.gather(1, index.expand(-1, -1, 4))
        return Encoded(cells, grids, logits.gather(1, index.expand(-1, -1, logits.shape[-1])), boxes)

    def noisy(
        self, labels: Sequence[Tensor], boxes: Sequence[Tensor], draws: Draws | None = None
    ) -> NoisyObjects:
        """The objects of all images, spoilt for the denoising. boxes: (n, 4) of each."""
        config = self.config.denoising
        groups = config.groups(max(map(len, labels)))
        rows = 2 * groups * sum(map(len, labels))
        draws = draw(rows, self.num_classes, self.levels.device) if draws is None else draws
        return spoil(labels, boxes, draws, groups, config, EPS)

    def noisy_queries(self, noisy: NoisyObjects) -> Tensor:
        """Contents (B, S, D) of the slots."""
        contents: Tensor = self.noisy_labels(noisy.labels)
        return contents * noisy.is_used[..., None].to(contents.dtype)

    def decode(self, encoded: Encoded, noisy: NoisyObjects | None = None) -> Decoded:
        """noisy: objects whose queries stand in front of the others."""
        grids, config = encoded.grids, self.config
        count = encoded.logits.shape[1]
        queries = self.contents.weight[:count].expand(len(encoded.memory), -1, -1)
        logits, hidden = encoded.box_logits.detach(), None
        if noisy is not None:
            slots = noisy.labels.shape[1]
            queries = torch.cat([self.noisy_queries(noisy), queries], 1)
            logits = torch.cat([noisy.box_logits.to(logits), logits], 1)
            hidden = hidden_queries(slots, noisy.groups, count, queries.device)
        reference = logits.sigmoid()
        shares = grids.shares.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        result = Decoded([], [reference], [], [])
        for i, layer in enumerate(self.decoder):
            at = reference.detach()[:, :, None] * shares
            sines = box_sines(at[:, :, 0], config.dim // 2, temperature=config.box_temperature)
            places = self.places(sines.to(queries.dtype))
            queries = layer(queries, places, at, encoded.memory, grids.sizes, grids.padding, hidden)
            self._tell(i, queries, reference, result)
            reference = result.references[-1]
        return result

    def _tell(self, i: int, queries: Tensor, reference: Tensor, result: Decoded) -> None:
        """What layer i says. reference: of the layer before, through which this one's boxes learn too."""
        exact = at_least_single(queries.dtype)
        state = self.norm(queries)
        before = box_logits(reference, eps=EPS)
        moved = self.regressors[i](queries).to(exact) + before.detach()
        result.states.append(state)
        result.references.append(moved.sigmoid())
        result.logits.append(self.classifiers[i](state).to(exact))
        result.boxes.append((self.regressors[i](state).to(exact) + before).sigmoid())

    def _matched(
        self, logits: Tensor, found: Tensor, labels: Tensor, boxes: Tensor, size: tuple[int, int]
    ) -> Targets:
        objects = assign(logits, found, labels, boxes, size, self.config.matching)
        is_object = objects >= 0
        wanted = torch.full_like(objects, self.num_classes)
        wanted[is_object] = labels[objects[is_object]]
        targets = found.new_zeros(found.shape)
        targets[is_object] = boxes[objects[is_object]].to(targets)
        return Targets(wanted, targets)

    def _denoised(self, labels: Tensor, boxes: Tensor, noisy: NoisyObjects) -> Targets:
        """The first half of each group finds its objects, the second half nothing."""
        slots = noisy.labels.shape[1]
        wanted = labels.new_full((noisy.groups, slots // noisy.groups), self.num_classes)
        targets = boxes.new_zeros(*wanted.shape, 4)
        wanted[:, : len(labels)] = labels
        targets[:, : len(labels)] = boxes
        return Targets(wanted.flatten(), targets.flatten(0, 1))

    def _named(self, name: str, terms: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        return {
            f"{name}_{what}": term for what, term in zip(("classes", "boxes", "giou"), terms, strict=True)
        }


def _regressor(dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(dim, dim), nn.ReLU(), Linear(dim, dim), nn.ReLU(), Linear(dim, 4))


def _to_parts(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """xyxy in pixels -> centre and size in parts of the image."""
    height, width = size
    parts = boxes / boxes.new_tensor([width, height, width, height])
    low, high = parts[:, :2], parts[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1)


def _mean_over_processes(count: Tensor) -> Tensor:
    """At least 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)
