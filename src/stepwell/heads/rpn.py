"""Where objects may be: a region proposal network.

Ren et al., arXiv 1506.01497, section 3.1; Lin et al., arXiv 1612.03144, section 4.1.
Letters: B batch, C width, (h, w) a map's grid, A anchors of a cell, L maps, N anchors of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.heads.anchors import AnchorConfig, are_valid, grid_anchors
from stepwell.heads.assign import Assignment, Sample, Sampling
from stepwell.heads.box_coder import BoxCoder
from stepwell.heads.box_loss import BoxLoss
from stepwell.layers.conv import Conv2d
from stepwell.ops.precision import at_least_single
from stepwell.ops.regions import suppress
from stepwell.structures import Extent, Objects, Size

__all__ = ["AnchorSample", "ProposalConfig", "Proposals", "Rpn", "RpnConfig"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProposalConfig:
    """per_level: best anchors of a map. iou: overlap from which on the worse of two of a map goes.
    num: best boxes of an image. smallest: width and height are larger than this.
    """

    per_level: int = Field(default=1000, ge=1)
    iou: float = 0.7
    num: int = Field(default=1000, ge=1)
    smallest: float = 0.0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RpnConfig:
    """The defaults are those of the released Mask R-CNNs.

    dim: width of the shared layer. border: pixels that an anchor may leave the image by and still be learnt
    from; None sets no limit. training, testing: what is proposed then.
    """

    dim: int = Field(default=256, ge=1)
    anchors: AnchorConfig = AnchorConfig()
    coder: BoxCoder = BoxCoder()
    assignment: Assignment = Assignment(positive=0.7, negative=0.3, smallest=0.3)
    sampling: Sampling = Sampling(num=256, positive=0.5)
    border: float | None = Field(default=None, ge=0)
    training: ProposalConfig = ProposalConfig(per_level=2000)
    testing: ProposalConfig = ProposalConfig()
    box_loss: BoxLoss = BoxLoss()
    objectness_weight: float = 1.0


class Proposals(NamedTuple):
    """Of one image, best first."""

    boxes: Tensor  # (n, 4)
    scores: Tensor  # (n,)


class AnchorSample(NamedTuple):
    """What is learnt from in one image: places of the sample are among the anchors that are allowed."""

    allowed: Tensor  # (a,) places among all anchors, level after level
    sample: Sample


class Rpn(nn.Module):
    """dim: width of the maps. strides: of every map."""

    def __init__(self, dim: int, strides: Sequence[float], config: RpnConfig) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.config = config
        self.conv = Conv2d(dim, config.dim, 3, padding=1)
        self.objectness = nn.Conv2d(config.dim, config.anchors.num_per_cell, 1)
        self.deltas = nn.Conv2d(config.dim, 4 * config.anchors.num_per_cell, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(B, C, h, w) -> logits (B, A, h, w) and deltas (B, 4*A, h, w) of every map, anchor after anchor."""
        hidden = [F.relu(self.conv(x)) for x in maps]
        return [self.objectness(x) for x in hidden], [self.deltas(x) for x in hidden]

    def anchors(self, grids: Sequence[Size], like: Tensor) -> list[Tensor]:
        """(h*w*A, 4) of every map."""
        return [
            grid_anchors(grid, stride, self.config.anchors, like)
            for grid, stride in zip(grids, self.strides, strict=True)
        ]

    @torch.no_grad()
    def propose(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        extents: Sequence[Extent],
        config: ProposalConfig,
    ) -> list[Proposals]:
        """The best boxes of each image, without a gradient."""
        scores = [_by_anchor(x, 1)[..., 0].sigmoid() for x in logits]
        moves = [_by_anchor(x, 4) for x in deltas]
        anchors = self.anchors([_grid(x) for x in logits], scores[0])
        found = []
        for image, extent in enumerate(extents):
            best = [_best(level[image], config.per_level) for level in scores]
            image_scores = torch.cat([s[image][k] for s, k in zip(scores, best, strict=True)])
            boxes = self.config.coder.decode(
                torch.cat([a[k] for a, k in zip(anchors, best, strict=True)]),
                torch.cat([m[image][k] for m, k in zip(moves, best, strict=True)]),
                extent.valid,
            )
            levels = torch.cat([torch.full_like(k, level) for level, k in enumerate(best)])
            large = (boxes[:, 2:] - boxes[:, :2] > config.smallest).all(1).nonzero()[:, 0]
            boxes, image_scores = boxes[large], image_scores[large]
            kept = suppress(boxes, image_scores, levels[large], config.iou)[: config.num]
            found.append(Proposals(boxes[kept], image_scores[kept]))
        return found

    @torch.no_grad()
    def draw(
        self, grids: Sequence[Size], extents: Sequence[Extent], objects: Sequence[Objects], like: Tensor
    ) -> list[AnchorSample]:
        """What is learnt from in each image. like: a tensor on the device, in the precision of the boxes."""
        anchors = torch.cat(self.anchors(grids, like))
        drawn = []
        for extent, truth in zip(extents, objects, strict=True):
            usable = are_valid(grids, self.strides, extent, self.config.anchors.num_per_cell, like.device)
            if (border := self.config.border) is not None:
                height, width = extent.valid
                usable &= (anchors[:, :2] >= -border).all(1)
                usable &= (anchors[:, 2] < width + border) & (anchors[:, 3] < height + border)
            allowed = usable.nonzero()[:, 0]
            assigned = self.config.assignment(anchors[allowed], truth.boxes.to(like))
            drawn.append(AnchorSample(allowed, self.config.sampling(assigned)))
        return drawn

    def level_losses(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        drawn: Sequence[AnchorSample],
        objects: Sequence[Objects],
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and of boxes, (L,) each. Both are by all anchors of the batch that are learnt
        from, where an image counts at least one positive and one negative.
        """
        grids = [_grid(x) for x in logits]
        sizes = [rows * cols * self.config.anchors.num_per_cell for rows, cols in grids]
        every_logit = torch.cat([_by_anchor(x, 1)[..., 0] for x in logits], dim=1)  # (B, N)
        every_delta = torch.cat([_by_anchor(x, 4) for x in deltas], dim=1)  # (B, N, 4)
        anchors = torch.cat(self.anchors(grids, every_logit))
        ends = torch.tensor(sizes, device=anchors.device).cumsum(0)
        objectness, boxes = every_logit.new_zeros(len(sizes)), every_logit.new_zeros(len(sizes))
        num = 0
        for image, ((allowed, sample), truth) in enumerate(zip(drawn, objects, strict=True)):
            num += max(len(sample.positive), 1) + max(len(sample.negative), 1)
            places, positive = allowed[sample.places], allowed[sample.positive]
            image_logits = every_logit[image][places]
            is_object = (torch.arange(len(places), device=places.device) < len(positive)).to(image_logits)
            errors = F.binary_cross_entropy_with_logits(image_logits, is_object, reduction="none")
            objectness = objectness.index_add(0, torch.bucketize(places, ends, right=True), errors)
            errors = self.config.box_loss(
                every_delta[image][positive],
                anchors[positive],
                truth.boxes.to(anchors)[sample.objects],
                self.config.coder,
            )
            boxes = boxes.index_add(0, torch.bucketize(positive, ends, right=True), errors)
        return self.config.objectness_weight * objectness / num, boxes / num

    def losses(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        extents: Sequence[Extent],
        objects: Sequence[Objects],
    ) -> dict[str, Tensor]:
        """Of a batch, named rpn_objectness and rpn_boxes."""
        like = logits[0].new_empty(0, dtype=at_least_single(logits[0].dtype))
        drawn = self.draw([_grid(x) for x in logits], extents, objects, like)
        objectness, boxes = self.level_losses(logits, deltas, drawn, objects)
        return {"rpn_objectness": objectness.sum(), "rpn_boxes": boxes.sum()}


def _grid(x: Tensor) -> Size:
    return x.shape[-2], x.shape[-1]


def _by_anchor(x: Tensor, num: int) -> Tensor:
    """(B, A*num, h, w) -> (B, h*w*A, num) in single precision at least."""
    rows: Tensor = x.unflatten(1, (-1, num)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    return rows.to(at_least_single(x.dtype))


def _best(scores: Tensor, num: int) -> Tensor:
    """Places of the best, best first; of all, in their order, where there are no more than `num`.

    Equal scores stand as torch's sort that is not stable leaves them: so they do in the official code, and
    which of them are proposed depends on it. Where none are equal there is one order, which is found sooner.
    """
    if len(scores) <= num:
        return torch.arange(len(scores), device=scores.device)
    values, places = scores.topk(num + 1)
    if (values[:-1] == values[1:]).any():
        places = scores.sort(descending=True).indices
    return places[:num]
