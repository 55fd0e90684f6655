"""Cascade Mask R-CNN: several second stages, each of which reads the boxes that the one before has moved.

Cai and Vasconcelos, arXiv 1712.00726 and 1906.09756. PIIP published results with it
and no settings: the defaults are those of ViT-Adapter, which the paper calls common practice; MMDET_CASCADE
has those of MMDetection's base file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.heads.assign import Assignment, Sampling
from stepwell.heads.box_coder import BoxCoder
from stepwell.heads.box_head import BoxHead, BoxHeadConfig
from stepwell.heads.box_loss import BoxLoss
from stepwell.heads.mask_head import MaskHead
from stepwell.heads.rpn import ProposalConfig, RpnConfig
from stepwell.heads.two_stage import (
    RegionOutput,
    RegionSample,
    TwoStage,
    TwoStageConfig,
    draw_regions,
    region_losses,
)
from stepwell.ops.double import AnyMap
from stepwell.structures import Extent, FoundObjects, Objects

__all__ = ["MMDET_CASCADE", "Cascade", "CascadeConfig", "StageConfig", "cascade_stages"]

OVERLAPS = (0.5, 0.6, 0.7)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
WEIGHTS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StageConfig:
    """weight: of all losses of the stage."""

    box: BoxHeadConfig = BoxHeadConfig()
    assignment: Assignment = Assignment(low_quality=False)
    sampling: Sampling = Sampling()
    weight: float = 1.0


def cascade_stages(
    *,
    num_convs: int,
    norm: Literal["batch"] | None,
    num_linears: int,
    per_class: bool,
    box_loss: BoxLoss,
) -> tuple[StageConfig, ...]:
    """Three stages with the published overlaps, deviations and weights."""
    return tuple(
        StageConfig(
            box=BoxHeadConfig(
                num_convs=num_convs,
                norm=norm,
                num_linears=num_linears,
                per_class=per_class,
                coder=BoxCoder(stds=stds),
                box_loss=box_loss,
            ),
            assignment=Assignment(positive=iou, negative=iou, smallest=iou, low_quality=False),
            weight=weight,
        )
        for iou, stds, weight in zip(OVERLAPS, STDS, WEIGHTS, strict=True)
    )


CASCADE_RPN = RpnConfig(
    border=0,
    training=ProposalConfig(per_level=2000, num=2000),
    box_loss=BoxLoss(measure="smooth_l1", beta=1 / 9),
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CascadeConfig(TwoStageConfig):
    """stages: first to last, any number."""

    kind: Literal["cascade"] = "cascade"
    rpn: RpnConfig = CASCADE_RPN
    stages: tuple[StageConfig, ...] = Field(
        default=cascade_stages(
            num_convs=4,
            norm="batch",
            num_linears=1,
            per_class=True,
            box_loss=BoxLoss(measure="giou", weight=10),
        ),
        min_length=1,
    )

    def build(self, dims: Sequence[int], strides: Sequence[float], num_classes: int) -> Cascade:
        """dims, strides: of the backbone's maps, finest first; any number of them."""
        return Cascade(dims, strides, num_classes, self)


MMDET_CASCADE = CascadeConfig(
    stages=cascade_stages(
        num_convs=0,
        norm=None,
        num_linears=2,
        per_class=False,
        box_loss=BoxLoss(measure="smooth_l1", beta=1.0),
    )
)


class Cascade(TwoStage):
    """As its settings say; see `CascadeConfig.build`."""

    def __init__(
        self, dims: Sequence[int], strides: Sequence[float], num_classes: int, config: CascadeConfig
    ) -> None:
        super().__init__(dims, strides, num_classes, config)
        self.config = config
        self.boxes = nn.ModuleList(
            BoxHead(config.dim, config.regions.box_side, num_classes, stage.box) for stage in config.stages
        )
        self.masks = nn.ModuleList(
            MaskHead(config.dim, num_classes, config.mask) for _ in (config.stages if config.masks else ())
        )

    @property
    def box_heads(self) -> list[BoxHead]:
        """One a stage."""
        return cast("list[BoxHead]", list(self.boxes))

    @property
    def mask_heads(self) -> list[MaskHead]:
        """One a stage; none without masks."""
        return cast("list[MaskHead]", list(self.masks))

    def losses(
        self, maps: Sequence[AnyMap], extents: Sequence[Extent], objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """Named rpn_objectness and rpn_boxes; classes_0, boxes_0 and, with masks, masks_0 of the first stage,
        and so on.
        """
        self.check(maps, extents, objects)
        levels = self.neck(maps)
        logits, deltas = self.rpn(levels)
        losses = self.rpn.losses(logits, deltas, extents, objects)
        proposals = self.rpn.propose(logits, deltas, extents, self.config.rpn.training)
        stage_losses, _ = self.learn(levels, [image.boxes for image in proposals], extents, objects)
        return losses | stage_losses

    def learn(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        extents: Sequence[Extent],
        objects: Sequence[Objects],
    ) -> tuple[dict[str, Tensor], list[tuple[list[RegionSample], RegionOutput]]]:
        """Losses of all stages, and what each drew and made of it.

        maps: of the pyramid. proposals (n, 4): boxes of each image.
        """
        losses: dict[str, Tensor] = {}
        seen = []
        candidates = list(proposals)
        for k, (head, stage) in enumerate(zip(self.box_heads, self.config.stages, strict=True)):
            samples = [
                draw_regions(
                    boxes, truth, self.num_classes, assignment=stage.assignment, sampling=stage.sampling
                )
                for boxes, truth in zip(candidates, objects, strict=True)
            ]
            output = self.read(head, maps, [image.boxes for image in samples])
            of_stage = region_losses(head, output, samples)
            if self.config.masks:
                of_stage["masks"] = self.masks_loss(self.mask_heads[k], maps, samples, objects)
            losses |= {f"{name}_{k}": stage.weight * loss for name, loss in of_stage.items()}
            seen.append((samples, output))
            candidates = [
                head.refine(*image, extent.valid, sample.labels)[~sample.is_given]
                for image, extent, sample in zip(output.images(), extents, samples, strict=True)
            ]
        return losses, seen

    def run_stages(
        self, maps: Sequence[Tensor], proposals: list[Tensor], extents: Sequence[Extent]
    ) -> list[RegionOutput]:
        """Every stage on the boxes that the one before has moved. maps: of the pyramid."""
        outputs = [self.read(self.box_heads[0], maps, proposals)]
        for before, head in pairwise(self.box_heads):
            moved = [
                before.refine(*image, extent.valid)
                for image, extent in zip(outputs[-1].images(), extents, strict=True)
            ]
            outputs.append(self.read(head, maps, moved))
        return outputs

    def choose(self, scored: Sequence[Tensor], extents: Sequence[Extent]) -> list[FoundObjects]:
        """Boxes of the last stage, classes by the mean of all stages' logits, masks by the mean of their
        probabilities.
        """
        return self.detect_in(*self.propose(scored, extents), extents)

    def detect_in(
        self, maps: Sequence[Tensor], proposals: list[Tensor], extents: Sequence[Extent]
    ) -> list[FoundObjects]:
        """As `choose`, in the boxes (n, 4) of each image. maps: of the pyramid."""
        outputs = self.run_stages(maps, proposals, extents)
        logits = torch.stack([output.logits for output in outputs]).mean(0)
        found = [
            self.box_heads[-1].select(*image, extent.valid, self.config.selection)
            for image, extent in zip(outputs[-1]._replace(logits=logits).images(), extents, strict=True)
        ]
        return self.add_masks(self.mask_heads, maps, found)
