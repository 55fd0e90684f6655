"""The closed-form cost, held against figures that torchvision publishes and against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from stepwell.flops.cost import CONVENTIONS, Cost, head_cost, injector_cost
from stepwell.flops.shapes import VitShape, shape_of
from stepwell.models.settings import InteractionConfig
from torchvision import models

from stepwell.encoders.catalogue import ENCODERS, build_encoder

PLAIN = CONVENTIONS["D"]


@pytest.mark.parametrize(
    ("encoder", "dim", "weights"),
    [
        ("vit_b", 768, models.ViT_B_16_Weights.IMAGENET1K_V1),
        ("vit_l", 1024, models.ViT_L_16_Weights.IMAGENET1K_V1),
    ],
)
def test_a_vit_with_its_head_costs_what_torchvision_publishes(encoder, dim, weights):
    shape = shape_of(encoder, {"class_token": True, "class_slot": True})
    cost = shape.cost((224, 224), PLAIN) + head_cost(197, dim, 1000)
    assert cost.macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=5e-4)
    assert cost.params == weights.meta["num_params"]


@pytest.mark.parametrize(
    ("encoder", "weights"),
    [
        ("convnext_t", models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
        ("convnext_s", models.ConvNeXt_Small_Weights.IMAGENET1K_V1),
        ("convnext_b", models.ConvNeXt_Base_Weights.IMAGENET1K_V1),
        ("convnext_l", models.ConvNeXt_Large_Weights.IMAGENET1K_V1),
    ],
)
def test_a_convnext_costs_what_torchvision_publishes(encoder, weights):
    shape = shape_of(encoder)
    cost = shape.cost((224, 224), PLAIN) + head_cost(0, shape.dims[-1], 1000)
    assert cost.macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=6e-4)  # they leave conv biases out
    assert cost.params == weights.meta["num_params"]


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_every_encoder_of_the_catalogue_has_as_many_parameters_as_its_shape_says(encoder):
    with torch.device("meta"):
        built = build_encoder(encoder)
    assert shape_of(encoder).cost((64, 96), PLAIN).params == sum(p.numel() for p in built.parameters())
    assert shape_of(encoder).dims == built.spec.dims
    assert shape_of(encoder).strides == built.spec.strides


def _tiny(**arguments):
    return VitShape(dim=8, depth=1, num_heads=1, **arguments)


def test_a_window_is_charged_whole_even_where_it_is_larger_than_the_grid():
    wide, narrow = (_tiny(windows=w, window_padding="qkv").cost((32, 48), PLAIN) for w in (5, 0))
    cells = 2 * 3
    assert wide.macs - narrow.macs == 2 * cells * (25 - cells) * 8


def test_padded_tokens_pass_the_qkv_layer_only():
    padded, bare = (_tiny(windows=2, window_padding=p).cost((48, 16), PLAIN) for p in ("tokens", "qkv"))
    assert padded.macs - bare.macs == (8 - 3) * 8 * 24  # a 3x1 grid becomes 4x2


def test_a_deformable_message_by_hand():
    cost = injector_cost((2, 3), (4, 5), 8, 12, InteractionConfig(num_heads=2, num_points=3))
    projection, value, offsets_and_weights, out = 20 * 12 * 8, 20 * 8 * 4, 6 * 8 * 18, 6 * 4 * 8
    norms, sampling = 2 * (6 + 20 + 6) * 8, 5 * 6 * 3 * 8
    ffn = 6 * 8 * 2 * 2 + 6 * (9 * 2 + 2)
    assert cost.macs == projection + value + offsets_and_weights + out + norms + sampling + ffn
    linears = (12 * 8 + 8) + (8 * 4 + 4) + (8 * 18 + 18) + (4 * 8 + 8) + (8 * 2 + 2) + (2 * 8 + 8)
    assert cost.params == linears + (9 * 2 + 2) + 3 * 16 + 2 * 8


def test_without_projection_the_value_layer_bridges_the_widths():
    slow, fast = (
        injector_cost((2, 2), (3, 3), 8, 12, InteractionConfig(project=project, norm=False, ffn_ratio=None))
        for project in (True, False)
    )
    assert slow.macs - fast.macs == 9 * 12 * 8 + 9 * 8 * 4 - 9 * 12 * 4


def test_costs_add_and_repeat():
    assert Cost(1, 2) + Cost(3, 4) * 2 == Cost(7, 10)
