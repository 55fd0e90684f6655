"""Pyramids of encoders: which layers run, who sees which picture, what leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.vit import VisionTransformer
from stepwell.fuse.merge import BranchMerge, LastMap, TokenMerge, stage_stacks
from stepwell.heads.neck import SimplePyramid
from stepwell.models.geometry import PyramidGeometry
from stepwell.models.piip import PiipVision, PyramidEncoder, PyramidFeatures, build_interactions
from stepwell.views.pyramid import image_pyramid

RATIOS = (0.5, 0.75, 1.0)


def vit(dim, depth=4, **arguments):
    return VisionTransformer(
        dim=dim, depth=depth, num_heads=2, mlp_ratio=2, position_grid=(4, 4), **arguments
    )


def make_pyramid(dims=(16, 12, 8), ranges=((0, 1), (2, 2)), **options):
    torch.manual_seed(0)
    branches = [vit(dim) for dim in dims]
    found = [ranges] * len(dims)
    interactions = build_interactions([b.spec for b in branches], found, num_heads=2)
    for name, parameter in nn.ModuleList(interactions).named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter)
    return PyramidEncoder(branches, interactions, found, **options).eval()


def make_views(size=(96, 64), ratios=RATIOS, batch=2):
    return image_pyramid(torch.randn(batch, 3, *size), ratios)


def test_without_interactions_every_branch_is_an_encoder_of_its_own():
    encoder, views = make_pyramid(ranges=()), make_views()
    (final,) = encoder(views)
    for branch, view, state in zip(encoder.branches, views, final, strict=True):
        assert torch.equal(state.tokens, branch(view).tokens)


def test_layers_run_up_to_each_interaction_and_the_rest_afterwards():
    encoder, views = make_pyramid(), make_views()
    states = [
        branch.run(branch.stem(view), 0, 1) for branch, view in zip(encoder.branches, views, strict=True)
    ]
    states = first = encoder.interactions[0](states)
    states = second = encoder.interactions[1](
        [b.run(s, 2, 2) for b, s in zip(encoder.branches, states, strict=True)]
    )
    states = [b.run(s, 3, 3) for b, s in zip(encoder.branches, states, strict=True)]
    for ours, expected in zip(encoder(views, after=[0, 1]), (first, second, states), strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("num_branches", [1, 2, 4, 5])
def test_any_number_of_branches_is_the_same_code(num_branches):
    dims = [8 * k for k in range(num_branches, 0, -1)]
    ratios = [(k + 1) / num_branches for k in range(num_branches)]
    (final,) = make_pyramid(dims)(make_views((160, 80), ratios))
    assert [s.size for s in final] == [(int(160 * r) // 16, int(80 * r) // 16) for r in ratios]
    assert [s.tokens.shape[-1] for s in final] == dims


def test_class_tokens_stay_with_their_branch():
    branches = [vit(16, class_token=True), vit(8)]
    ranges = [((0, 3),)] * 2
    interactions = build_interactions([b.spec for b in branches], ranges, num_heads=2)
    (final,) = PyramidEncoder(branches, interactions, ranges)(make_views(ratios=(0.5, 1.0)))
    assert final[0].class_token.shape == (2, 1, 16)
    assert final[1].class_token is None


def test_recomputing_gives_the_same_gradients():
    views, gradients = make_views(ratios=(0.5, 1.0)), []
    for checkpointing in (False, True):
        encoder = make_pyramid((16, 8), checkpointing=checkpointing).train()
        (final,) = encoder(views)
        sum(s.tokens.square().sum() for s in final).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_ranges_that_leave_layers_out_or_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"must adjoin and fit into 4 layers, got \[\(1, 3\)\]"):
        make_pyramid(ranges=((1, 3),))
    with pytest.raises(ValueError, match=r"\[\(0, 4\)\]"):
        make_pyramid(ranges=((0, 4),))
    with pytest.raises(ValueError, match="unknown directions 'up'"):
        build_interactions([], [], directions="up")


def make_mixed_features():
    """Two ConvNeXts: maps leave at strides 4, 8, 16 and 32."""
    branches = [ConvNeXt(dims=(8, 12, 16, 20), depths=(1, 1, 1, 1)) for _ in range(2)]
    ranges = [((0, 0), (1, 2), (3, 4), (5, 6))] * 2
    interactions = build_interactions([b.spec for b in branches], ranges, num_heads=2, drop_path=0.0)
    merges = [BranchMerge(stage_stacks((dim, dim), num_groups=2)) for dim in (8, 12, 16, 20)]
    encoder = PyramidEncoder(branches, interactions, ranges)
    return PyramidFeatures(
        encoder, merges, ratios=(0.5, 1.0), strides=(4, 8, 16, 32), merge_after=(0, 1, 2)
    ).eval()


def test_maps_leave_after_chosen_interactions_at_their_strides():
    features, image = make_mixed_features(), torch.randn(1, 3, 64, 128)
    maps = features(image)
    assert {stride: tuple(x.shape[1:]) for stride, x in maps.items()} == {
        4: (8, 16, 32),
        8: (12, 8, 16),
        16: (16, 4, 8),
        32: (20, 2, 4),
    }
    kept = features.encoder(image_pyramid(image, (0.5, 1.0)), (0, 1, 2))
    torch.testing.assert_close(maps[8], features.merges[1](features.encoder.maps(kept[1])))


@pytest.mark.parametrize("merge_after", [(2,), (-1,), (1, 0), (0, 0)])
def test_merges_come_after_rising_interactions(merge_after):
    merges = [LastMap()] * (len(merge_after) + 1)
    with pytest.raises(ValueError, match="must rise strictly within the 2 interactions"):
        PyramidFeatures(
            make_pyramid(), merges, ratios=RATIOS, strides=range(len(merges)), merge_after=merge_after
        )


def test_the_final_merge_is_not_asked_for_twice():
    options = {"ratios": RATIOS, "strides": (8, 16), "merge_after": (1,)}
    PyramidFeatures(make_pyramid(), [LastMap()] * 2, **options)  # a layer runs behind the last interaction
    with pytest.raises(ValueError, match="the final merge is already there"):
        PyramidFeatures(make_pyramid(ranges=((0, 1), (2, 3))), [LastMap()] * 2, **options)


def test_a_single_branch_needs_no_merge():
    encoder = make_pyramid((16,), ())
    neck = SimplePyramid([16] * 4, norm="layernorm")
    features = PyramidFeatures(encoder, [LastMap()], neck, ratios=(1.0,), strides=(4, 8, 16, 32))
    image = torch.randn(1, 3, 64, 96)
    (final,) = encoder([image])
    assert torch.equal(features(image)[16], encoder.maps(final)[0])
    with pytest.raises(ValueError, match="takes 2 merges"):
        PyramidFeatures(encoder, [LastMap()], ratios=(1.0,), strides=(16,), merge_after=(0,))
    with pytest.raises(ValueError, match="needs interactions"):
        PyramidFeatures(encoder, [LastMap()] * 2, ratios=(1.0,), strides=(8, 16), merge_after=(0,))


def make_vision(framing="aspect", **projector):
    sides = (64, 96, 128)
    geometry = PyramidGeometry(
        names=("a", "b", "c"),
        sides=sides,
        strides=(16, 16, 16),
        framing=framing,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return PiipVision(make_pyramid(), TokenMerge((16, 12, 8), 24, num_groups=4, **projector), geometry).eval()


@pytest.mark.parametrize("framing", ["aspect", "pad"])
@pytest.mark.parametrize("grid", [None, (3, 5)])
def test_tokens_are_as_many_as_the_layout_says(framing, grid):
    vision = make_vision(framing, grid=grid)
    vision.geometry = PyramidGeometry(
        **{**{f: getattr(vision.geometry, f) for f in vision.geometry.__slots__}, "grid": grid}
    )
    layout = vision.layout((300, 410))
    tokens, size = vision([torch.randn(2, 3, *layout.inputs[0])])
    assert tokens.shape == (2, layout.num_tokens, 24)
    assert size == (grid or layout.views[-1].grid)


def test_features_are_maps_by_stride_in_the_largest_view():
    maps = make_vision().features([torch.randn(1, 3, 96, 128)])
    assert {stride: tuple(x.shape[1:]) for stride, x in maps.items()} == {
        16: (8, 6, 8),
        21: (12, 4, 6),
        32: (16, 3, 4),
    }
    assert list(maps) == [16, 21, 32]


def test_a_batch_gives_what_single_pictures_give():
    vision, views = make_vision(), torch.randn(3, 3, 96, 128)
    batch = vision([views]).tokens
    for i in range(3):
        torch.testing.assert_close(vision([views[i : i + 1]]).tokens[0], batch[i], rtol=1e-4, atol=1e-5)
