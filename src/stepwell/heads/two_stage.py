"""What two-stage detectors share: maps of a pyramid, regions that are proposed, drawn and pooled, and masks.

Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870.
Letters: B batch, C width of a map, (h, w) its grid, n objects of an image, R regions, r of an image, p of
them positive, s side of a pooled region, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.heads.assign import Assignment, Sample, Sampling
from stepwell.heads.box_head import BoxHead, ScoredBoxes, Selection
from stepwell.heads.detection import DetectionHead
from stepwell.heads.fpn import FeaturePyramid, pyramid_strides
from stepwell.heads.mask_head import MaskHead, MaskHeadConfig, mask_loss, mask_targets
from stepwell.heads.rpn import Rpn, RpnConfig
from stepwell.ops.double import AnyMap
from stepwell.ops.finite import check_finite
from stepwell.ops.regions import pool_region_levels
from stepwell.structures import Extent, FoundObjects, Objects

__all__ = [
    "RegionConfig",
    "RegionOutput",
    "RegionSample",
    "TwoStage",
    "TwoStageConfig",
    "draw_regions",
    "region_losses",
]

CELLS_OF_FINEST = 14  # cells of the finest map in the side of a box that is the next map's


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RegionConfig:
    """Sides of pooled regions for boxes and for masks; samples and aligned: see `pool_regions`.

    finest: the next map is read from twice this side of a box, in pixels; None is 14 cells of the finest map.
    """

    box_side: int = Field(default=7, ge=1)
    mask_side: int = Field(default=14, ge=1)
    finest: float | None = Field(default=None, gt=0)
    samples: int = Field(default=0, ge=0)
    aligned: bool = True


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TwoStageConfig:
    """dim: width of the pyramid. num_extra: its maps behind the backbone's, which only proposals are made of.
    masks: whether there are mask heads.
    """

    dim: int = Field(default=256, ge=1)
    num_extra: int = Field(default=1, ge=0)
    rpn: RpnConfig = RpnConfig()
    regions: RegionConfig = RegionConfig()
    masks: bool = True
    mask: MaskHeadConfig = MaskHeadConfig()
    selection: Selection = Selection()


class RegionSample(NamedTuple):
    """Regions of one image that are learnt from, positives first."""

    sample: Sample  # places among the candidates, where the boxes of the objects may stand in front
    boxes: Tensor  # (r, 4)
    labels: Tensor  # (r,) background is last of all classes
    targets: Tensor  # (r, 4) boxes of the objects; a background's own
    is_given: Tensor  # (r,) whether it is the box of an object, put in front

    @property
    def positive_boxes(self) -> Tensor:
        """(p, 4)."""
        return self.boxes[: len(self.sample.positive)]


class RegionOutput(NamedTuple):
    """What a second stage makes of the regions of all images, image after image."""

    boxes: list[Tensor]  # (r, 4) of each image
    logits: Tensor  # (R, K+1)
    deltas: Tensor  # (R, K or 1, 4)

    def images(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits (r, K+1), deltas (r, K or 1, 4) and boxes (r, 4) of each image."""
        counts = [len(boxes) for boxes in self.boxes]
        return zip(self.logits.split(counts), self.deltas.split(counts), self.boxes, strict=True)


def region_losses(head: BoxHead, output: RegionOutput, samples: Sequence[RegionSample]) -> dict[str, Tensor]:
    """Of classes and boxes; the samples are those that the output was made of."""
    return head.losses(
        output.logits,
        output.deltas,
        torch.cat(output.boxes),
        torch.cat([image.labels for image in samples]),
        torch.cat([image.targets for image in samples]),
    )


@torch.no_grad()
def draw_regions(
    candidates: Tensor,
    objects: Objects,
    num_classes: int,
    *,
    assignment: Assignment,
    sampling: Sampling,
    give_objects: bool = True,
) -> RegionSample:
    """candidates (c, 4). give_objects: the objects' own boxes stand in front of the candidates."""
    truths, labels = objects.boxes.to(candidates), objects.labels.to(candidates.device)
    assigned = assignment(candidates, truths)
    num_given = len(truths) if give_objects else 0
    if num_given:
        candidates = torch.cat([truths, candidates])
        assigned = torch.cat([torch.arange(num_given, device=assigned.device), assigned])
    sample = sampling(assigned)
    places = sample.places
    boxes = candidates[places]
    background = labels.new_full((len(sample.negative),), num_classes)
    return RegionSample(
        sample,
        boxes,
        torch.cat([labels[sample.objects], background]).long(),
        torch.cat([truths[sample.objects], boxes[len(sample.positive) :]]),
        places < num_given,
    )


class TwoStage(DetectionHead):
    """dims, strides: of the backbone's maps, finest first. Subclasses add their heads for boxes and masks."""

    def __init__(
        self, dims: Sequence[int], strides: Sequence[float], num_classes: int, config: TwoStageConfig
    ) -> None:
        super().__init__()
        if not dims or len(dims) != len(strides) or any(a >= b for a, b in pairwise(strides)):
            raise ValueError(
                f"need one width and one stride a map, finest first, got {list(dims)} and {list(strides)}"
            )
        if num_classes < 1:
            raise ValueError(f"need a class to find, got num_classes {num_classes}")
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.settings = config
        self.finest = config.regions.finest or CELLS_OF_FINEST * strides[0]
        self.neck = FeaturePyramid(dims, config.dim, num_extra=config.num_extra)
        self.rpn = Rpn(config.dim, pyramid_strides(strides, config.num_extra), config.rpn)

    def score(self, maps: Sequence[AnyMap], extents: Sequence[Extent]) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) of the pyramid, then of each of them the logits (B, A, h, w) of A anchors a
        cell, then the deltas (B, 4*A, h, w) of these.
        """
        self.check(maps)
        levels = self.neck(maps)
        logits, deltas = self.rpn(levels)
        return (*levels, *logits, *deltas)

    def propose(
        self, scored: Sequence[Tensor], extents: Sequence[Extent]
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        """scored: of `score` -> the pyramid, and the boxes (r, 4) of each image in which objects may be."""
        count = len(scored) // 3
        levels, logits, deltas = scored[:count], scored[count : 2 * count], scored[2 * count :]
        self.check(levels[: len(self.strides)], extents)
        check_finite(*logits, *deltas)
        proposals = self.rpn.propose(logits, deltas, extents, self.settings.rpn.testing)
        return levels, [image.boxes for image in proposals]

    def pool(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
        """maps (B, C, h, w) of the pyramid, boxes (r, 4) of each image -> (R, C, s, s), image after image."""
        counts = torch.tensor([len(image) for image in boxes], device=maps[0].device)
        images = torch.arange(len(boxes), device=counts.device).repeat_interleave(counts)
        regions = self.settings.regions
        return pool_region_levels(
            maps[: len(self.strides)],
            torch.cat(list(boxes)),
            images,
            side,
            strides=self.strides,
            finest=self.finest,
            samples=regions.samples,
            aligned=regions.aligned,
        )

    def read(self, head: BoxHead, maps: Sequence[Tensor], boxes: list[Tensor]) -> RegionOutput:
        """A second stage on boxes (r, 4) of each image. maps: of the pyramid."""
        logits, deltas = head(self.pool(maps, boxes, self.settings.regions.box_side))
        return RegionOutput(boxes, logits, deltas)

    def masks_loss(
        self,
        head: MaskHead,
        maps: Sequence[Tensor],
        samples: Sequence[RegionSample],
        objects: Sequence[Objects],
    ) -> Tensor:
        """Of the positives of all images. maps: of the pyramid."""
        side = self.settings.regions.mask_side
        labels, targets = [], []
        for drawn, truth in zip(samples, objects, strict=True):
            if not len(drawn.sample.positive):
                continue
            if truth.masks is None:
                raise ValueError("an image has objects without masks; give them, or build with masks=False")
            labels.append(drawn.labels[: len(drawn.sample.positive)])
            masks = truth.masks.to(drawn.boxes.device)
            targets.append(mask_targets(masks, drawn.positive_boxes, drawn.sample.objects, 2 * side))
        regions = self.pool(maps, [drawn.positive_boxes for drawn in samples], side)
        every_label = torch.cat(labels) if labels else samples[0].labels[:0]
        logits = head(regions, every_label)
        every_target = torch.cat(targets) if targets else torch.zeros_like(logits)
        return self.settings.mask.weight * mask_loss(logits, every_target)

    def add_masks(
        self, heads: Sequence[MaskHead], maps: Sequence[Tensor], found: Sequence[ScoredBoxes]
    ) -> list[FoundObjects]:
        """What was found with the mean of the heads' probabilities; maps: of the pyramid."""
        if not heads:
            return [FoundObjects(*image) for image in found]
        regions = self.pool(maps, [image.boxes for image in found], self.settings.regions.mask_side)
        labels = torch.cat([image.labels for image in found])
        masks = torch.stack([head(regions, labels).sigmoid() for head in heads]).mean(0)
        check_finite(masks)
        parts = masks.split([len(image.boxes) for image in found])
        return [FoundObjects(*image, part) for image, part in zip(found, parts, strict=True)]

    def check(
        self,
        maps: Sequence[AnyMap],
        extents: Sequence[Extent] | None = None,
        objects: Sequence[Objects] | None = None,
    ) -> None:
        """Raises ValueError where the numbers of maps, images, extents and objects do not agree."""
        if len(maps) != len(self.strides):
            raise ValueError(f"this head reads {len(self.strides)} maps, got {len(maps)}")
        if extents is None:
            return
        batch = len(maps[0])
        if len(extents) != batch:
            raise ValueError(f"need an extent for each of {batch} images, got {len(extents)}")
        if objects is None:
            return
        if len(objects) != batch:
            raise ValueError(f"need objects (maybe none) for each of {batch} images, got {len(objects)}")
        for image in objects:
            if len(image.boxes) != len(image.labels):
                raise ValueError(f"an image has {len(image.boxes)} boxes and {len(image.labels)} labels")
