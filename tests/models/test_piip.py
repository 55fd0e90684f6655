"""PIIP-LLaVA's vision: tokens and maps of images of any size, in any company."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from pyramids import make_pyramid

from stepwell.fuse.merge import ProjectorConfig, TokenMerge
from stepwell.models.piip import PiipVision
from stepwell.views.pyramid import PyramidGeometry


def make_vision(framing="aspect", grid=None):
    geometry = PyramidGeometry(
        names=("a", "b", "c"),
        sides=(64, 96, 128),
        strides=(16, 16, 16),
        framing=framing,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        grid=grid,
    )
    return PiipVision(
        make_pyramid(), TokenMerge((16, 12, 8), 24, ProjectorConfig(num_groups=4, grid=grid)), geometry
    ).eval()


def inputs_of(*layouts):
    torch.manual_seed(1)
    return [torch.randn(3, *size) for layout in layouts for size in layout.inputs]


@pytest.mark.parametrize("framing", ["aspect", "pad"])
@pytest.mark.parametrize("grid", [None, (3, 5)])
def test_tokens_are_as_many_as_the_layout_says(framing, grid):
    vision = make_vision(framing, grid)
    layouts = [vision.geometry.layout(size) for size in ((300, 410), (90, 30))]
    for tokens, layout in zip(vision(inputs_of(*layouts), layouts), layouts, strict=True):
        assert tokens.shape == (layout.num_visual, 24)


def test_maps_know_their_view_and_their_stride_in_the_largest():
    vision = make_vision()
    layout = vision.geometry.layout((100, 400))
    (features,) = vision.encode(inputs_of(layout), [layout])
    assert [tuple(m.map.shape) for m in features.maps] == [(16, 2, 4), (12, 3, 6), (8, 4, 8)]
    assert [m.stride for m in features.maps] == pytest.approx([32, 16 / 0.75, 16])
    assert [m.view for m in features.maps] == list(layout.views)


def test_branches_of_one_stride_both_keep_their_maps():
    vision = make_vision()
    vision.geometry = replace(vision.geometry, sides=vision.geometry.sides[-1:] * 3)
    layout = vision.geometry.layout((300, 400))
    (features,) = vision.encode(inputs_of(layout), [layout])
    assert [m.stride for m in features.maps] == [16.0, 16.0, 16.0]


def test_images_of_a_batch_give_what_they_give_alone():
    vision = make_vision()
    layouts = [vision.geometry.layout(size) for size in ((300, 410), (20, 90), (64, 64))]
    inputs, passes = inputs_of(*layouts), []
    vision.encoders[0].patch_embed.register_forward_hook(lambda *_: passes.append(1))
    together = vision.encode(inputs, layouts)
    assert len(passes) == 2  # images that are alike in shape share a pass
    for image, layout, features in zip(inputs, layouts, together, strict=True):
        (alone,) = vision.encode([image], [layout])
        torch.testing.assert_close(features.tokens, alone.tokens, rtol=1e-4, atol=1e-5)
        for a, b in zip(features.maps, alone.maps, strict=True):
            torch.testing.assert_close(a.map, b.map, rtol=1e-4, atol=1e-5)


def test_a_geometry_draws_the_views_that_the_branches_are_given():
    vision = make_vision()
    layout = vision.geometry.layout((300, 400))
    (image,) = inputs_of(layout)
    seen = []
    for encoder in vision.encoders:
        encoder.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    vision.encode([image], [layout])
    for view, given in zip(vision.geometry.views([image], layout), seen, strict=True):
        assert torch.equal(view, given)


def test_the_geometry_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_vision().geometry.framing = "crop"
