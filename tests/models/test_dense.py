"""Maps of several strides leave a pyramid."""

from __future__ import annotations

import pytest
import torch
from pyramids import RATIOS, make_pyramid

from stepwell.encoders.convnext import ConvNeXt
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import BranchMerge, LastMap, stage_stacks
from stepwell.heads.neck import SimplePyramid
from stepwell.models.dense import PyramidFeatures
from stepwell.models.pyramid import PyramidEncoder, build_interactions
from stepwell.views.pyramid import image_pyramid


def make_mixed_features():
    """Two ConvNeXts: maps leave at strides 4, 8, 16 and 32."""
    branches = [ConvNeXt(dims=(8, 12, 16, 20), depths=(1, 1, 1, 1)) for _ in range(2)]
    ranges = [((0, 0), (1, 2), (3, 4), (5, 6))] * 2
    interactions = build_interactions(
        [b.spec for b in branches], ranges, InteractionConfig(num_heads=2, drop_path=0.0)
    )
    merges = [BranchMerge(stage_stacks((dim, dim), num_groups=2)) for dim in (8, 12, 16, 20)]
    encoder = PyramidEncoder(branches, interactions, ranges)
    return PyramidFeatures(
        encoder,
        merges,
        ratios=(0.5, 1.0),
        strides=(4, 8, 16, 32),
        dims=(8, 12, 16, 20),
        merge_after=(0, 1, 2),
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
    steps = features.encoder(image_pyramid(image, (0.5, 1.0)), (0, 1, 2))
    torch.testing.assert_close(maps[8], features.merges[1](features.encoder.maps(steps[1])))


@pytest.mark.parametrize("merge_after", [(2,), (-1,), (1, 0), (0, 0)])
def test_merges_come_after_rising_interactions(merge_after):
    merges = [LastMap()] * (len(merge_after) + 1)
    with pytest.raises(ValueError, match="must rise strictly within the 2 interactions"):
        PyramidFeatures(
            make_pyramid(),
            merges,
            ratios=RATIOS,
            strides=range(len(merges)),
            dims=(),
            merge_after=merge_after,
        )


def test_the_final_merge_is_not_asked_for_twice():
    options = {"ratios": RATIOS, "strides": (8, 16), "dims": (16, 16), "merge_after": (1,)}
    PyramidFeatures(make_pyramid(), [LastMap()] * 2, **options)  # a layer runs behind the last interaction
    with pytest.raises(ValueError, match="the final merge is already there"):
        PyramidFeatures(make_pyramid(ranges=((0, 1), (2, 3))), [LastMap()] * 2, **options)


def test_a_single_branch_needs_no_merge():
    encoder = make_pyramid((16,), ())
    neck = SimplePyramid([16] * 4, norm="layernorm")
    features = PyramidFeatures(
        encoder, [LastMap()], neck, ratios=(1.0,), strides=(4, 8, 16, 32), dims=[16] * 4
    )
    image = torch.randn(1, 3, 64, 96)
    (final,) = encoder([image])
    assert torch.equal(features(image)[16], encoder.maps(final)[0])
    with pytest.raises(ValueError, match="takes 2 merges"):
        PyramidFeatures(encoder, [LastMap()], ratios=(1.0,), strides=(16,), dims=(16,), merge_after=(0,))
    with pytest.raises(ValueError, match="needs interactions"):
        PyramidFeatures(
            encoder, [LastMap()] * 2, ratios=(1.0,), strides=(8, 16), dims=(16, 16), merge_after=(0,)
        )
