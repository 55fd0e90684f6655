"""Mask R-CNN: regions are proposed, and each gets a class, a box and a mask; without masks, Faster R-CNN.

He et al., arXiv 1703.06870; Ren et al., arXiv 1506.01497. The defaults are those of the released
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.heads.assign import Assignment, Sampling
from stepwell.heads.box_head import BoxHead, BoxHeadConfig
from stepwell.heads.mask_head import MaskHead
from stepwell.heads.two_stage import RegionSample, TwoStage, TwoStageConfig, draw_regions, region_losses
from stepwell.ops.double import AnyMap
from stepwell.structures import Extent, FoundObjects, Objects

__all__ = ["Rcnn", "RcnnConfig"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RcnnConfig(TwoStageConfig):
    """box: the head of the second stage. assignment, sampling: of the regions that it learns from."""

    kind: Literal["rcnn"] = "rcnn"
    box: BoxHeadConfig = BoxHeadConfig()
    assignment: Assignment = Assignment()
    sampling: Sampling = Sampling()

    def build(self, dims: Sequence[int], strides: Sequence[float], num_classes: int) -> Rcnn:
        """dims, strides: of the backbone's maps, finest first; any number of them."""
        return Rcnn(dims, strides, num_classes, self)


class Rcnn(TwoStage):
    """As its settings say; see `RcnnConfig.build`."""

    def __init__(
        self, dims: Sequence[int], strides: Sequence[float], num_classes: int, config: RcnnConfig
    ) -> None:
        super().__init__(dims, strides, num_classes, config)
        self.config = config
        self.box = BoxHead(config.dim, config.regions.box_side, num_classes, config.box)
        self.mask = MaskHead(config.dim, num_classes, config.mask) if config.masks else None

    def losses(
        self, maps: Sequence[AnyMap], extents: Sequence[Extent], objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """Named rpn_objectness, rpn_boxes, classes, boxes and, with masks, masks."""
        self.check(maps, extents, objects)
        levels = self.neck(maps)
        logits, deltas = self.rpn(levels)
        losses = self.rpn.losses(logits, deltas, extents, objects)
        proposals = self.rpn.propose(logits, deltas, extents, self.config.rpn.training)
        samples = self.draw([image.boxes for image in proposals], objects)
        output = self.read(self.box, levels, [image.boxes for image in samples])
        losses |= region_losses(self.box, output, samples)
        if self.mask is not None:
            losses["masks"] = self.masks_loss(self.mask, levels, samples, objects)
        return losses

    def draw(self, proposals: Sequence[Tensor], objects: Sequence[Objects]) -> list[RegionSample]:
        """proposals (n, 4): boxes of each image."""
        return [
            draw_regions(
                boxes,
                truth,
                self.num_classes,
                assignment=self.config.assignment,
                sampling=self.config.sampling,
            )
            for boxes, truth in zip(proposals, objects, strict=True)
        ]

    def choose(self, scored: Sequence[Tensor], extents: Sequence[Extent]) -> list[FoundObjects]:
        levels, proposals = self.propose(scored, extents)
        output = self.read(self.box, levels, proposals)
        found = [
            self.box.select(*image, extent.valid, self.config.selection)
            for image, extent in zip(output.images(), extents, strict=True)
        ]
        return self.add_masks([] if self.mask is None else [self.mask], levels, found)
