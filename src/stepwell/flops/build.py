"""Pyramids on the meta device, to be counted: as they are, and as the official counter rebuilt them.

PIIP, arXiv 2501.07783, section III. Letters: branch 1 is the largest network on the smallest view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stepwell.fuse.merge import BranchMerge, dense_stacks, linear_stacks, stage_stacks
from stepwell.heads.classify import BranchHeads, MergedHead
from stepwell.heads.neck import Resampling, SimplePyramid
from stepwell.models.config import BranchConfig, InteractionConfig, PiipConfig
from stepwell.models.piip import PyramidClassifier, PyramidEncoder, PyramidFeatures
from stepwell.models.vision import build_pyramid_encoder
from stepwell.views.pyramid import exact_ratio

__all__ = ["STAGE_MERGES", "build_classifier", "build_encoder_only", "build_features"]

STAGE_MERGES = (0, 1, 10)
"""Of 12 interactions, those after which a pyramid with ConvNeXt branches merges, beside the last."""


def build_encoder_only(branches: Sequence[BranchConfig], interaction: InteractionConfig) -> PyramidEncoder:
    with torch.device("meta"):
        return build_pyramid_encoder(PiipConfig(branches=tuple(branches), interaction=interaction)).eval()


def build_classifier(
    branches: Sequence[BranchConfig],
    interaction: InteractionConfig,
    *,
    merged: bool,
    num_classes: int = 1000,
) -> PyramidClassifier:
    """With one head on the merged map, or a head a branch. One branch needs no merging, and has one head."""
    encoder = build_encoder_only(branches, interaction)
    dims = [branch.spec.dim for branch in encoder.encoders]
    with torch.device("meta"):
        head: nn.Module
        if merged or len(dims) == 1:
            stacks = linear_stacks(dims) if len(dims) > 1 else [nn.Identity()]
            head = MergedHead(BranchMerge(stacks), dims[0], num_classes)
        else:
            head = BranchHeads(dims, num_classes)
        return PyramidClassifier(encoder, head, ratios=_ratios(branches)).eval()


def build_features(
    branches: Sequence[BranchConfig], interaction: InteractionConfig, *, merge: str, finest: bool = True
) -> PyramidFeatures:
    """For dense tasks, with the small pyramid behind it; merge: "dense" or "stages", as `Published.merge`."""
    encoder = build_encoder_only(branches, interaction)
    after = STAGE_MERGES if merge == "stages" else ()
    layers = [[branch.interactions[i][1] for branch in branches] for i in after]
    layers.append([branch.spec.depth - 1 for branch in encoder.encoders])
    dims = [
        [branch.spec.dims[i] for branch, i in zip(encoder.encoders, step, strict=True)] for step in layers
    ]
    stacks = stage_stacks if merge == "stages" else dense_stacks
    same_stride = len({encoder.encoders[-1].spec.strides[step[-1]] for step in layers}) == 1
    strides = (4, 8, 16, 32) if finest else (8, 16, 32)
    with torch.device("meta"):
        neck = None
        if same_stride:
            widths = [dims[min(i, len(dims) - 1)][0] for i in range(4)][-len(strides) :]
            operations: tuple[Resampling, ...] = ("up4", "up2", "same", "maxpool2")
            neck = SimplePyramid(widths, operations=operations[-len(strides) :])
        merges = [BranchMerge(stacks(widths)) for widths in dims]
        return PyramidFeatures(
            encoder, merges, neck, ratios=_ratios(branches), strides=strides, merge_after=after
        ).eval()


def _ratios(branches: Sequence[BranchConfig]) -> list[float]:
    return [exact_ratio(branch.size, branches[-1].size) for branch in branches]
