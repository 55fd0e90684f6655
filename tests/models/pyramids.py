"""Small pyramids with open gates, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import nn

from stepwell.encoders.vit import VisionTransformer
from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.pyramid import PyramidEncoder, build_interactions
from stepwell.views.pyramid import image_pyramid

RATIOS = (0.5, 0.75, 1.0)


def vit(dim, depth=4, **arguments):
    return VisionTransformer(
        dim=dim, depth=depth, num_heads=2, mlp_ratio=2, position_grid=(4, 4), **arguments
    )


def make_pyramid(dims=(16, 12, 8), ranges=((0, 1), (2, 2))):
    torch.manual_seed(0)
    branches = [vit(dim) for dim in dims]
    all_ranges = [ranges] * len(dims)
    specs = [branch.spec for branch in branches]
    interactions = build_interactions(specs, all_ranges, InteractionConfig(num_heads=2))
    for name, parameter in nn.ModuleList(interactions).named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter)
    return PyramidEncoder(branches, interactions, all_ranges).eval()


def make_views(size=(96, 64), ratios=RATIOS, batch=2):
    return image_pyramid(torch.randn(batch, 3, *size), ratios)
