"""The closed-form cost, held against figures that torchvision publishes and against sums done by hand."""

from __future__ import annotations

import pytest
from torchvision import models

from stepwell.flops.cost import (
    CONVENTIONS,
    ConvNextShape,
    Cost,
    InteractionShape,
    VitShape,
    head_cost,
    injector_cost,
)

PLAIN = CONVENTIONS["A"]


@pytest.mark.parametrize(
    ("depth", "dim", "weights"),
    [(12, 768, models.ViT_B_16_Weights.IMAGENET1K_V1), (24, 1024, models.ViT_L_16_Weights.IMAGENET1K_V1)],
)
def test_a_vit_with_its_head_costs_what_torchvision_publishes(depth, dim, weights):
    shape = VitShape(dim=dim, windows=(0,) * depth, class_token=True, layer_scale=False, position_tokens=197)
    cost = shape.cost((224, 224), PLAIN) + head_cost(197, dim)
    assert cost.macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=5e-4)
    assert cost.params == weights.meta["num_params"]


@pytest.mark.parametrize(
    ("depths", "widths", "weights"),
    [
        ((3, 3, 9, 3), (96, 192, 384, 768), models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
        ((3, 3, 27, 3), (96, 192, 384, 768), models.ConvNeXt_Small_Weights.IMAGENET1K_V1),
        ((3, 3, 27, 3), (128, 256, 512, 1024), models.ConvNeXt_Base_Weights.IMAGENET1K_V1),
        ((3, 3, 27, 3), (192, 384, 768, 1536), models.ConvNeXt_Large_Weights.IMAGENET1K_V1),
    ],
)
def test_a_convnext_costs_what_torchvision_publishes(depths, widths, weights):
    cost = ConvNextShape(depths=depths, widths=widths, final_norm=True).cost((224, 224), PLAIN)
    assert cost.macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=6e-4)  # they leave conv biases out
    assert cost.params + (widths[-1] + 1) * 1000 == weights.meta["num_params"]


def test_a_window_is_charged_whole_even_where_it_is_larger_than_the_grid():
    wide, narrow = (VitShape(dim=8, windows=(window,)).cost((32, 48), PLAIN) for window in (5, 0))
    cells = 2 * 3
    assert wide.macs - narrow.macs == 2 * cells * (25 - cells) * 8


def test_padded_tokens_pass_the_qkv_layer_only():
    padded, bare = (
        VitShape(dim=8, windows=(2,), pad_tokens=pad).cost((48, 16), PLAIN) for pad in (True, False)
    )
    assert padded.macs - bare.macs == (8 - 3) * 8 * 24  # a 3x1 grid becomes 4x2


def test_a_deformable_injector_by_hand():
    shape = InteractionShape(num_heads=2, num_points=3)
    cost = injector_cost((2, 3), (4, 5), 8, 12, shape)
    projection, value, offsets_and_weights, out = 20 * 12 * 8, 20 * 8 * 4, 6 * 8 * 18, 6 * 4 * 8
    norms, sampling = 2 * (6 + 20 + 6) * 8, 5 * 6 * 3 * 8
    ffn = 6 * 8 * 2 * 2 + 6 * (9 * 2 + 2)
    assert cost.macs == projection + value + offsets_and_weights + out + norms + sampling + ffn
    linears = (12 * 8 + 8) + (8 * 4 + 4) + (8 * 18 + 18) + (4 * 8 + 8) + (8 * 2 + 2) + (2 * 8 + 8)
    assert cost.params == linears + (9 * 2 + 2) + 3 * 16 + 2 * 8


def test_without_projection_the_value_layer_bridges_the_widths():
    fast = InteractionShape(project=False, norm=False, ffn_ratio=None)
    slow = InteractionShape(norm=False, ffn_ratio=None)
    query, key = (2, 2), (3, 3)
    difference = injector_cost(query, key, 8, 12, slow).macs - injector_cost(query, key, 8, 12, fast).macs
    assert difference == 9 * 12 * 8 + 9 * 8 * 4 - 9 * 12 * 4


def test_costs_add_and_repeat():
    assert Cost(1, 2) + Cost(3, 4) * 2 == Cost(7, 10)
