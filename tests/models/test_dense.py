"""Maps of several strides leave a pyramid."""

from __future__ import annotations

import pytest
import torch
from pyramids import make_pyramid
from torch import nn

from stepwell.encoders.convnext import ConvNeXt
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import BranchMerge, LastMap, stage_stacks
from stepwell.heads.neck import SimplePyramid
from stepwell.layers.linear import Linear
from stepwell.models.dense import ClassifierSettings, DenseSettings, PyramidFeatures
from stepwell.models.perception import PyramidBackbone, PyramidBackboneConfig
from stepwell.models.published.papers import PUBLISHED
from stepwell.models.pyramid import BranchConfig, PyramidEncoder, build_interactions
from stepwell.ops import products
from stepwell.structures import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD
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
    assert features.strides == (4, 8, 16, 32)
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 16, 32), (12, 8, 16), (16, 4, 8), (20, 2, 4)]
    steps = features.encoder(image_pyramid(image, (0.5, 1.0)), (0, 1, 2))
    torch.testing.assert_close(maps[1], features.merges[1](features.encoder.maps(steps[1])))


@pytest.mark.parametrize("name", ["piip_det_convnext_tsb_1024_672_448", "piip_det_beit_sbl_1568_1120_672"])
def test_every_linear_layer_has_its_product_chosen(name):
    with torch.device("meta"):
        features = PUBLISHED[name].settings.build()
    kinds = [type(module) for module in features.modules() if isinstance(module, nn.Linear)]
    assert kinds == [Linear] * len(kinds)
    assert len(kinds) > 100


@pytest.mark.parametrize("grad", [False, True])
def test_products_taken_as_convolutions_give_the_same_maps_and_gradients(monkeypatch, grad):
    features, image = make_mixed_features(), torch.randn(1, 3, 64, 128)
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)
    monkeypatch.setattr(products, "FEWEST_PRODUCTS", 1)
    taken = []
    fast = products.linear_fast
    monkeypatch.setattr(products, "linear_fast", lambda *given: taken.append(1) or fast(*given))
    found = {}
    for slow in (False, True):
        monkeypatch.setattr(products, "has_slow_products", lambda slow=slow: slow)
        with torch.set_grad_enabled(grad):
            maps = features(image)
        found[slow] = [*maps]
        if grad:
            parameters = [p for p in features.parameters() if p.requires_grad]
            total = sum(x.square().mean() for x in maps)
            found[slow] += [
                g for g in torch.autograd.grad(total, parameters, allow_unused=True) if g is not None
            ]
    assert len(taken) > 20
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def dense(*ranges, **options):
    branch = BranchConfig(encoder="vit_nano", size=64, interactions=ranges)
    return DenseSettings(branches=(branch, branch), interaction=InteractionConfig(num_heads=2), **options)


def test_the_final_merge_is_not_asked_for_twice():
    dense((0, 1), (2, 2), merge_after=(1,), operations=())  # a layer runs behind the last interaction
    with pytest.raises(ValueError, match="the final merge is already there"):
        dense((0, 1), (2, 3), merge_after=(1,), operations=())


def test_maps_of_one_stride_all_leave():
    """Two operations of the neck, or two merges of networks whose grid stays."""
    image = torch.randn(1, 3, 64, 64)
    for settings in (
        dense(operations=("same", "same")),
        dense((0, 1), (2, 2), merge_after=(0,), operations=()),
    ):
        features = settings.build()
        assert features.strides == (16, 16)
        assert [tuple(x.shape) for x in features(image)] == [(1, 64, 4, 4)] * 2
        maps = PyramidBackbone(PyramidBackboneConfig(settings))(image).feature_maps
        assert [tuple(x.shape) for x in maps] == [(1, 64, 4, 4)] * 2


def test_strides_are_not_rounded():
    branch = BranchConfig(encoder="vit_nano", size=56, arguments={"patch": 14})
    features = DenseSettings(branches=(branch,), merge="none").build()
    assert features.strides == (3.5, 7, 14, 28)
    assert [x.shape[-1] for x in features(torch.randn(1, 3, 56, 56))] == [56 / s for s in features.strides]


def test_several_merges_each_go_through_an_operation_of_their_own():
    features = dense((0, 1), (2, 2), merge_after=(0,), operations=("up2", "same")).build().eval()
    image = torch.randn(1, 3, 64, 64)
    first, final = features.encoder([image, image], (0,))
    expected = features.neck(
        [m(features.encoder.maps(s)) for m, s in zip(features.merges, (first, final), strict=True)]
    )
    for ours, theirs in zip(features(image), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [DenseSettings, ClassifierSettings])
def test_statistics_are_those_of_branch_1_unless_told(kind):
    branches = tuple(BranchConfig(encoder=name, size=224) for name in ("augreg_l", "deit3_s"))
    assert kind(branches=branches).statistics == (HALF_MEAN, HALF_STD)
    assert kind(branches=branches[::-1]).statistics == (IMAGENET_MEAN, IMAGENET_STD)
    assert kind(branches=branches, mean=CLIP_MEAN).statistics == (CLIP_MEAN, HALF_STD)
    assert kind(branches=branches, std=CLIP_STD).statistics == (HALF_MEAN, CLIP_STD)


def test_a_head_that_reads_class_tokens_wants_one_in_every_branch():
    one, none = (
        BranchConfig(encoder="vit_nano", size=64, arguments={"class_token": has}) for has in (True, False)
    )
    ClassifierSettings(branches=(one, BranchConfig(encoder="clip_b", size=64)), head="cls")
    ClassifierSettings(branches=(none,))
    for branches in ((one, none), (none, one), (BranchConfig(encoder="convnext_t", size=64),)):
        with pytest.raises(ValueError, match="class token of every branch"):
            ClassifierSettings(branches=branches, head="cls")


def test_a_single_branch_needs_no_merge():
    encoder = make_pyramid((16,), ())
    neck = SimplePyramid([16] * 4, norm="layernorm")
    features = PyramidFeatures(
        encoder, [LastMap()], neck, ratios=(1.0,), strides=(4, 8, 16, 32), dims=[16] * 4
    )
    image = torch.randn(1, 3, 64, 96)
    (final,) = encoder([image])
    assert torch.equal(features(image)[2], encoder.maps(final)[0])
    with pytest.raises(ValueError, match="takes 2 merges"):
        PyramidFeatures(encoder, [LastMap()], ratios=(1.0,), strides=(16,), dims=(16,), merge_after=(0,))


@pytest.mark.parametrize(
    ("image_branch", "ratios", "strides"),
    [
        (None, (1.0, 0.5), (8, 16, 32, 64)),  # the largest network reads the largest image
        (1, (2.0, 1.0), (4, 8, 16, 32)),
    ],
)
def test_views_come_from_the_largest_size_or_that_of_a_chosen_branch(image_branch, ratios, strides):
    branches = tuple(BranchConfig(encoder="vit_nano", size=size) for size in (64, 32))
    settings = DenseSettings(branches=branches, image_branch=image_branch)
    network = settings.build().eval()
    assert (network.ratios, network.strides) == (ratios, strides)
    side = settings.image_side
    with torch.no_grad():
        maps = network(torch.randn(1, 3, side, side))
    assert [x.shape[2] for x in maps] == [8, 4, 2, 1]


@pytest.mark.parametrize("image_branch", [-1, 2])
def test_a_branch_that_there_is_not_gives_no_image(image_branch):
    branches = tuple(BranchConfig(encoder="vit_nano", size=size) for size in (64, 32))
    with pytest.raises(ValueError, match=f"image_branch {image_branch} of 2 branches"):
        DenseSettings(branches=branches, image_branch=image_branch)
