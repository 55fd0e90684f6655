"""DINO: maps of any backbone -> boxes and classes, without anchors and without NMS.

DINO, arXiv 2203.03605, with all that is in it: two stages with mixed query selection, look forward twice,
contrastive denoising; numbers and layers as PIIP (arXiv 2501.07783) trained its detectors.
Letters: B batch, N cells of all levels, C width, Q queries, K classes, S sets of predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.heads.channel_mapper import ChannelMapper
from stepwell.heads.detection import DetectionHead
from stepwell.heads.dino_boxes import to_corners
from stepwell.heads.dino_denoising import (
    Denoising,
    Draws,
    contents,
    denoising,
    draw,
    num_groups,
    unseen_queries,
)
from stepwell.heads.dino_matching import (
    BoxTerms,
    SetLosses,
    Truths,
    assign,
    average_over_processes,
    set_losses,
)
from stepwell.heads.dino_positions import Levels, cell_code, level_geometry, proposals
from stepwell.heads.dino_transformer import (
    Decoder,
    Encoder,
    LayerOutput,
    PlacedAttention,
    perceptron,
    refine,
)
from stepwell.layers.deformable import DeformableAttention
from stepwell.layers.linear import Linear
from stepwell.ops.double import AnyMap
from stepwell.ops.precision import at_least_single
from stepwell.ops.rearrange import map_to_tokens
from stepwell.structures import Extent, FoundObjects, Objects

__all__ = [
    "DenoisingConfig",
    "Dino",
    "DinoConfig",
    "Matched",
    "Memory",
    "Predictions",
    "Selection",
    "best_boxes",
]

PRIOR = 0.01  # of every class before training

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DenoisingConfig:
    """num_queries: positives of the image with most objects, all groups together. label_noise: twice the
    chance of another label. box_noise: how far a corner may go, in halves of the box's side.
    """

    num_queries: Count = 100
    label_noise: Annotated[float, Field(ge=0, le=2)] = 0.5
    box_noise: Annotated[float, Field(ge=0)] = 1.0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DinoConfig:
    """Defaults: the three detectors that PIIP published.

    num_levels: the backbone's maps and coarser ones behind them, each half as large as the one before.
    norm_groups: of the neck. num_heads and num_points: of deformable attention, per level;
    self_attention_heads: of queries among each other. cell_temperature, box_temperature: of the sine codes of
    the encoder's cells and the decoder's boxes. max_detections: of an image.
    """

    kind: Literal["dino"] = "dino"
    dim: Count = 256
    num_levels: Count = 4
    norm_groups: Count = 32
    num_queries: Count = 900
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    ffn_dim: Count = 2048
    num_heads: Count = 8
    num_points: Count = 4
    self_attention_heads: Count = 8
    cell_temperature: Positive = 20.0
    box_temperature: Positive = 10000.0
    denoising: DenoisingConfig = DenoisingConfig()
    cost: BoxTerms = BoxTerms(label=2.0)
    loss: BoxTerms = BoxTerms(label=1.0)
    max_detections: Count = 300

    def __post_init__(self) -> None:
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4, for sine codes of two axes, got {self.dim}")
        for name in ("num_heads", "self_attention_heads", "norm_groups"):
            if self.dim % getattr(self, name):
                raise ValueError(f"dim {self.dim} does not divide into {name} {getattr(self, name)}")

    def build(self, dims: Sequence[int], strides: Sequence[float], num_classes: int) -> Dino:
        """dims and strides: of the backbone's maps, finest first. The strides may be any."""
        if len(dims) != len(strides):
            raise ValueError(f"{len(dims)} widths and {len(strides)} strides do not tell the same maps")
        return Dino(dims, num_classes, self)


class Memory(NamedTuple):
    """What the encoder leaves of a batch."""

    cells: Tensor  # (B, N, C)
    levels: Levels


class Selection(NamedTuple):
    """The encoder's best cells, best first."""

    logits: Tensor  # (B, Q, K)
    boxes: Tensor  # (B, Q, 4) by centre, in fractions


class Predictions(NamedTuple):
    """Of every decoder layer."""

    logits: Tensor  # (layers, B, Q, K)
    boxes: Tensor  # (layers, B, Q, 4) by centre, in fractions


class Matched(NamedTuple):
    """Predictions, and which object of the batch each is to find, -1 for none."""

    found: Predictions  # of the encoder, then of every layer: (S, B, Q, ...)
    assigned: Tensor  # (S, B, Q)
    spoilt: Predictions  # of every layer for the queries that denoise
    wanted: Tensor  # as `assigned`
    truths: Truths


class Dino(DetectionHead):
    """dims: width of the backbone's maps, finest first.

    The neck's norms and the codes of the decoder's boxes see the padding of a batch, as in the official code:
    to be the same in any company, an image must be padded to the same size.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        dim, layers = config.dim, config.decoder_layers
        attention = {
            "num_heads": config.num_heads,
            "num_levels": config.num_levels,
            "num_points": config.num_points,
            "ffn_dim": config.ffn_dim,
        }
        self.neck = ChannelMapper(dims, dim, num_levels=config.num_levels, num_groups=config.norm_groups)
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, dim))
        self.encoder = Encoder(dim, num_layers=config.encoder_layers, **attention)
        self.memory_proj = Linear(dim, dim)
        self.memory_norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.empty(config.num_queries, dim))
        self.label_embedding = nn.Embedding(num_classes, dim)
        self.decoder = Decoder(
            dim,
            num_layers=layers,
            num_self_heads=config.self_attention_heads,
            temperature=config.box_temperature,
            **attention,
        )
        # One for every decoder layer, the last for the encoder.
        self.class_heads = nn.ModuleList(Linear(dim, num_classes) for _ in range(layers + 1))
        self.box_heads = nn.ModuleList(perceptron(dim, dim, dim, 4) for _ in range(layers + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the official code; what is not named here starts as torch's layers do."""
        for part in (self.encoder, self.decoder, self.memory_proj):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention | PlacedAttention):
                module.reset_parameters()
        for table in (self.level_embedding, self.queries, self.label_embedding.weight):
            nn.init.normal_(table)
        for class_head, box_head in zip(self.class_heads, self.box_heads, strict=True):
            assert isinstance(class_head, nn.Linear)
            assert isinstance(box_head, nn.Sequential)
            nn.init.constant_(class_head.bias, -math.log((1 - PRIOR) / PRIOR))
            for parameter in box_head[-1].parameters():
                nn.init.zeros_(parameter)

    def losses(
        self,
        maps: Sequence[AnyMap],
        extents: Sequence[Extent],
        objects: Sequence[Objects],
        *,
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        """`encoder_`, `layer1_`, ... and `denoising1_`, ... by `class`, `box` and `giou`.

        draws: the random numbers of denoising, instead of torch's next ones. Raises ValueError for labels
        that are none of the classes.
        """
        return self.losses_of(self.match(maps, extents, objects, draws=draws))

    def match(
        self,
        maps: Sequence[AnyMap],
        extents: Sequence[Extent],
        objects: Sequence[Objects],
        *,
        draws: Draws | None = None,
    ) -> Matched:
        """What every query of encoder and decoder says, and what it should."""
        memory = self.encode(maps, extents)
        truths = self._truths(extents, objects)
        denoised = self.denoise(truths, draws)
        selection = self.select(memory)
        predictions = self.predict(self.decode(memory, selection, denoised))
        count = denoised.num_queries
        found = Predictions(
            torch.cat([selection.logits[None], predictions.logits[:, :, count:]]),
            torch.cat([selection.boxes[None], predictions.boxes[:, :, count:]]),
        )
        spoilt = Predictions(predictions.logits[:, :, :count], predictions.boxes[:, :, :count])
        return Matched(
            found,
            assign(found.logits, found.boxes, truths, self.config.cost),
            spoilt,
            denoised.assigned.expand(spoilt.logits.shape[:3]),
            truths,
        )

    def losses_of(self, matched: Matched) -> dict[str, Tensor]:
        found, assigned, spoilt, wanted, truths = matched
        counts = torch.stack([(x[0] >= 0).sum() for x in (assigned, wanted)])
        of_found, of_spoilt = average_over_processes(counts.to(found.logits.dtype))
        terms, layers = self.config.loss, range(1, self.config.decoder_layers + 1)
        return {
            **_named(
                ["encoder", *(f"layer{i}" for i in layers)],
                set_losses(*found, assigned, truths, terms, of_found),
            ),
            **_named(
                [f"denoising{i}" for i in layers], set_losses(*spoilt, wanted, truths, terms, of_spoilt)
            ),
        }

    def score(self, maps: Sequence[AnyMap], extents: Sequence[Extent]) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, K) and boxes (B, Q, 4), by centre in fractions, of the last layer's queries."""
        memory = self.encode(maps, extents)
        last = self.decode(memory, self.select(memory))[-1:]
        logits, boxes = self.predict(last)
        return logits[-1], boxes[-1]

    def choose(self, scored: Sequence[Tensor], extents: Sequence[Extent]) -> list[FoundObjects]:
        """The best pairs of a query and a class of each image, clipped to its valid part."""
        logits, boxes = scored
        return best_boxes(logits, boxes, extents, self.config.max_detections)

    def encode(self, maps: Sequence[AnyMap], extents: Sequence[Extent]) -> Memory:
        """maps (B, C', h, w), finest first."""
        self._check(maps, extents)
        weight = self.level_embedding
        levels_maps = self.neck([x.to(weight.dtype) for x in maps])
        sizes = [(x.shape[2], x.shape[3]) for x in levels_maps]
        exact = at_least_single(weight.dtype)  # places are lost in half precision
        levels = level_geometry(sizes, extents, dtype=exact, device=weight.device)
        code = cell_code(levels, self.config.dim, temperature=self.config.cell_temperature)
        of_level = torch.cat([vector.expand(h * w, -1) for vector, (h, w) in zip(weight, sizes, strict=True)])
        cells = torch.cat([map_to_tokens(x) for x in levels_maps], 1)
        return Memory(self.encoder(cells, code.to(weight.dtype) + of_level, levels), levels)

    def _check(self, maps: Sequence[AnyMap], extents: Sequence[Extent]) -> None:
        expected = len(self.neck.projections)
        if len(maps) != expected:
            raise ValueError(f"this head was built for {expected} maps and got {len(maps)}")
        if any(len(x) != len(extents) for x in maps):
            raise ValueError(f"maps of {[len(x) for x in maps]} images came with {len(extents)} extents")

    def select(self, memory: Memory) -> Selection:
        """The cells with the largest logit of any class."""
        wanted = min(self.config.num_queries, memory.levels.num_cells)
        logits_of_cells, none = proposals(memory.levels)
        features = self.memory_norm(self.memory_proj(memory.cells.masked_fill(none[..., None], 0)))
        logits = self.class_heads[-1](features).to(logits_of_cells.dtype)
        best = logits.amax(-1).topk(wanted, dim=1).indices

        def of_best(x: Tensor) -> Tensor:
            return x.gather(1, best[..., None].expand(-1, -1, x.shape[-1]))

        moved = self.box_heads[-1](of_best(features)).to(logits.dtype) + of_best(logits_of_cells)
        return Selection(of_best(logits), moved.sigmoid())

    def decode(
        self, memory: Memory, selection: Selection, denoised: Denoising | None = None
    ) -> list[LayerOutput]:
        """One output a layer, of the queries that denoise and then the others."""
        references = selection.boxes.detach()
        count = references.shape[1]  # small images have fewer cells than there are queries
        queries = self.queries[:count].expand(len(references), -1, -1)
        unseen = None
        if denoised is not None:
            queries = torch.cat([contents(self.label_embedding, denoised), queries], 1)
            references = torch.cat([denoised.box_logits.sigmoid(), references], 1)
            unseen = unseen_queries(denoised, count)
        outputs: list[LayerOutput] = self.decoder(
            queries,
            references,
            memory.cells,
            memory.levels,
            [partial(refine, box_head) for box_head in self.box_heads[:-1]],
            unseen,
        )
        return outputs

    def predict(self, outputs: Sequence[LayerOutput]) -> Predictions:
        """Of the last layers, or of all."""
        first = self.config.decoder_layers - len(outputs)
        heads = zip(self.class_heads[first:-1], self.box_heads[first:-1], strict=True)
        logits, boxes = [], []
        for output, (class_head, box_head) in zip(outputs, heads, strict=True):
            logits.append(class_head(output.states).to(output.references.dtype))
            boxes.append(refine(box_head, output.states, output.references))
        return Predictions(torch.stack(logits), torch.stack(boxes))

    def _truths(self, extents: Sequence[Extent], objects: Sequence[Objects]) -> Truths:
        if len(objects) != len(extents):
            raise ValueError(f"objects of {len(objects)} images came with {len(extents)} extents")
        exact = at_least_single(self.queries.dtype)
        truths = Truths.of(extents, objects, like=self.queries.detach().to(exact))
        labels = truths.labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            wrong = sorted(set(labels.tolist()) - set(range(self.num_classes)))
            raise ValueError(
                f"labels of {self.num_classes} classes are 0 to {self.num_classes - 1}, got {wrong}"
            )
        return truths

    def denoise(self, truths: Truths, draws: Draws | None = None) -> Denoising:
        config = self.config.denoising
        groups = num_groups(truths.counts, config.num_queries)
        if draws is None:
            rows = 2 * groups * sum(truths.counts)
            draws = draw(rows, self.num_classes, device=truths.boxes.device)
        return denoising(
            (truths.boxes / truths.scale).split(truths.counts),
            truths.labels.split(truths.counts),
            draws,
            groups,
            label_noise=config.label_noise,
            box_noise=config.box_noise,
        )


def best_boxes(
    logits: Tensor, boxes: Tensor, extents: Sequence[Extent], max_detections: int
) -> list[FoundObjects]:
    """logits (B, Q, K), boxes (B, Q, 4) by centre in fractions -> the best pairs of a query and a class."""
    scores, places = logits.sigmoid().flatten(1).topk(min(max_detections, logits[0].numel()), dim=1)
    labels, queries = places % logits.shape[-1], places // logits.shape[-1]
    detections = []
    for image, (height, width) in enumerate(extent.valid for extent in extents):
        scale = boxes.new_tensor([width, height] * 2)
        corners = to_corners(boxes[image, queries[image]]) * scale
        clipped = torch.minimum(corners.clamp(min=0), scale)
        detections.append(FoundObjects(clipped, scores[image], labels[image]))
    return detections


def _named(sets: Sequence[str], losses: SetLosses) -> dict[str, Tensor]:
    """One name a set and term."""
    return {
        f"{name}_{term}": loss
        for term, values in zip(("class", "box", "giou"), losses, strict=True)
        for name, loss in zip(sets, values.unbind(), strict=True)
    }
