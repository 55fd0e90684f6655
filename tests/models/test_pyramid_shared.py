"""One encoder at several scales: its weights are there once, and it is what copies of it would be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from stepwell.flops.report import report
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import ProjectorConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.perception import PyramidBackbone, PyramidBackboneConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.pyramid_shared import PyramidSharedConfig
from stepwell.structures import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD

OUT = 24
SIZES = (32, 64, 128)


def config_of(**settings):
    settings = {"projector": ProjectorConfig(num_groups=4), "framing": "aspect", **settings}
    return PyramidSharedConfig(encoder="vit_nano", sizes=SIZES, **settings)


def vision_of(**settings):
    torch.manual_seed(0)
    return config_of(**settings).build(OUT).eval()


def inputs_of(*layouts):
    torch.manual_seed(1)
    return [torch.randn(3, *size) for layout in layouts for size in layout.inputs]


def branches(encoder="vit_nano", sizes=SIZES, **fields):
    return tuple(BranchConfig(encoder=encoder, size=size, **fields) for size in sizes)


def test_tokens_are_the_sum_of_one_network_on_every_view():
    vision = vision_of()
    layout = vision.geometry.layout((60, 90))
    (image,) = inputs_of(layout)
    total, encoder = 0, vision.encoder.branches[0]
    rows, cols = layout.views[-1].grid
    for view, stack in zip(layout.views, vision.projector.stacks, strict=True):
        seen = F.interpolate(image[None], view.size, mode="bilinear")
        map = encoder(seen).tokens.transpose(1, 2).unflatten(2, view.grid)
        map = F.interpolate(map, (rows, cols), mode="bilinear")
        first, norm, _, second = stack
        x = F.conv2d(map, first.weight[:, :, None, None], first.bias)
        x = F.gelu(F.group_norm(x, 4, norm.weight, norm.bias))
        total = total + F.conv2d(x, second.weight[:, :, None, None], second.bias)
    (tokens,) = vision([image], [layout])
    assert layout.num_visual == rows * cols
    torch.testing.assert_close(tokens, total.flatten(2)[0].T, atol=1e-5, rtol=1e-4)


def test_the_encoder_is_there_once():
    names = [name for name in vision_of().state_dict() if name.startswith("encoder.")]
    assert all(name.startswith("encoder.branches.0.") for name in names)
    vision = vision_of()
    assert [encoder is vision.encoders[0] for encoder in vision.encoders] == [True] * len(SIZES)


@pytest.mark.parametrize("framing", ["aspect", "pad"])
@pytest.mark.parametrize("grid", [None, (3, 2)])
def test_images_of_any_shape_give_in_a_batch_what_they_give_alone(framing, grid):
    vision = vision_of(framing=framing, projector=ProjectorConfig(num_groups=4, grid=grid))
    layouts = [vision.geometry.layout(size) for size in ((300, 410), (20, 90), (31, 30), (3, 900))]
    inputs = inputs_of(*layouts)
    for image, layout, features in zip(inputs, layouts, vision.encode(inputs, layouts), strict=True):
        assert features.tokens.shape == (layout.num_visual, OUT)
        (alone,) = vision.encode([image], [layout])
        torch.testing.assert_close(features.tokens, alone.tokens, rtol=1e-4, atol=1e-5)
        assert [m.stride for m in features.maps] == [64, 32, 16]
        assert [m.map.shape[1:] for m in features.maps] == [view.grid for view in layout.views]


def test_statistics_are_the_encoders_unless_told():
    geometry = PyramidSharedConfig(encoder="augreg_l").geometry()
    assert (geometry.mean, geometry.std) == (HALF_MEAN, HALF_STD)
    geometry = config_of(mean=CLIP_MEAN, std=CLIP_STD).geometry()
    assert (geometry.mean, geometry.std) == (CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("settings", "cells"), [({}, 1), ({"arguments": {"windows": 2}}, 2), ({"min_cells": 2}, 2)]
)
def test_a_long_image_has_room_for_a_window_in_every_view(settings, cells):
    views = config_of(**settings).geometry().layout((3, 900)).views
    assert [view.grid for view in views] == [(cells * k, 2 * k) for k in (1, 2, 4)]


def test_half_precision_gives_the_same_tokens_but_for_rounding():
    vision = vision_of()
    layout = vision.geometry.layout((60, 90))
    inputs = inputs_of(layout)
    expected = vision(inputs, [layout])[0]
    half = vision.bfloat16()([x.bfloat16() for x in inputs], [layout])[0]
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_sizes_change_with_the_geometry_and_rise():
    assert config_of().adjusted({"sizes": [64, 96, 160]}).sizes == (64, 96, 160)
    assert config_of().largest == 128
    for sizes in ([64, 128], [64, 64, 128], [128, 64, 32]):
        with pytest.raises(ValueError, match=r"has 3 views|the smallest first, got"):
            config_of().adjusted({"sizes": sizes})
    with pytest.raises(ValueError, match="unknown encoder 'vit_xxl'"):
        PyramidSharedConfig(encoder="vit_xxl")


# ---- dense tasks and classification


RANGES = {"interactions": ((0, 1), (2, 3)), "arguments": {"dim": 32, "num_heads": 2}}
FEW = InteractionConfig(num_heads=2, drop_path=0.0)


@pytest.mark.parametrize("fields", [{}, RANGES], ids=["apart", "in conversation"])
@pytest.mark.parametrize("kind", [DenseSettings, ClassifierSettings])
def test_a_shared_network_gives_what_equal_copies_give_and_learns_from_all_views(kind, fields):
    settings = [kind(branches=branches(**fields), interaction=FEW, shared=shared) for shared in (True, False)]
    torch.manual_seed(0)
    if kind is DenseSettings:
        shared, copies = (one.build().eval() for one in settings)
    else:
        shared, copies = (one.build(num_classes=3).eval() for one in settings)
    state = shared.state_dict()
    for k in range(len(SIZES)):
        copies.encoder.branches[k].load_state_dict(shared.encoder.branches[0].state_dict())
    copies.load_state_dict(state, strict=False)
    image = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(1))
    totals = []
    for network in (shared, copies):
        out = network(image)
        totals.append(list(out) if isinstance(out, tuple) else [out])
        sum(x.square().mean() for x in totals[-1]).backward()
    for ours, expected in zip(*totals, strict=True):
        torch.testing.assert_close(ours, expected)
    views = [dict(branch.named_parameters()) for branch in copies.encoder.branches]
    for name, parameter in shared.encoder.branches[0].named_parameters():
        expected = sum(view[name].grad for view in views)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-3)


def test_a_shared_backbone_is_saved_once_and_comes_back(tmp_path):
    settings = DenseSettings(branches=branches(**RANGES), interaction=FEW, shared=True)
    model = PyramidBackbone(PyramidBackboneConfig(settings)).eval()
    model.save_pretrained(tmp_path)
    saved = {name.split(".")[3] for name in load_file(tmp_path / "model.safetensors") if ".branches." in name}
    assert saved == {"0"}
    assert json.loads((tmp_path / "config.json").read_text())["pyramid"]["shared"] is True
    image = torch.randn(1, 3, 128, 96)
    again = PyramidBackbone.from_pretrained(tmp_path).eval()
    for ours, expected in zip(again(image).feature_maps, model(image).feature_maps, strict=True):
        assert torch.equal(ours, expected)
    model.gradient_checkpointing_enable()
    maps = model.train()(image).feature_maps
    maps[0].sum().backward()
    assert all(p.grad is not None for p in model.pyramid.encoder.branches.parameters())


@pytest.mark.parametrize("kind", [DenseSettings, ClassifierSettings])
def test_only_one_network_can_be_shared(kind):
    kind(branches=(*branches(sizes=(32,)), *branches(sizes=(64,))), shared=True)
    kind(branches=(*branches(sizes=(32,)), *branches("vit_t", (64,))))
    for other in (branches("vit_t", (64,)), branches(sizes=(64,), arguments={"depth": 2})):
        with pytest.raises(ValueError, match="one network may differ in their sizes only"):
            kind(branches=(*branches(sizes=(32,)), *other), shared=True)
    lists, tuples = ({"position_grid": grid} for grid in ([4, 4], (4, 4)))
    kind(branches=(*branches(arguments=lists), *branches(arguments=tuples)), shared=True)


def test_every_view_is_counted_and_every_weight_once():
    """PIIP prints 369 for this pyramid with separate weights (Table XIV), which cost as much to run."""
    of_table_14 = branches("deit3_b", (224, 448, 896), arguments={"windows": 14})
    shared, apart = (report(DenseSettings(branches=of_table_14, shared=shared)) for shared in (True, False))
    assert shared.printed_gflops == pytest.approx(369, rel=0.01)
    assert shared.gmacs == pytest.approx(apart.gmacs)
    assert shared.gflops == pytest.approx(apart.gflops)
    encoder = {part.name: part.params for part in apart.parts}["branches.0"]
    assert apart.params - shared.params == 2 * encoder
    system = report(config_of())
    alone = [report(PyramidSharedConfig(encoder="vit_nano", sizes=(size,))).parts[0] for size in SIZES]
    assert system.parts[0].macs == sum(part.macs for part in alone)
    assert system.parts[0].params == alone[0].params
