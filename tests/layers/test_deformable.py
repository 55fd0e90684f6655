"""Deformable attention as a layer: where offsets start, and how long they are."""

from __future__ import annotations

import pytest
import torch

from stepwell.layers.deformable import DeformableAttention
from stepwell.ops.deform_attn import deform_attn

SIZES = [(3, 4), (2, 2)]


def make(**changes):
    arguments = {"num_heads": 2, "num_levels": 2, "num_points": 3, **changes}
    attention = DeformableAttention(8, 6, 4, **arguments).double()
    for linear in (attention.offsets, attention.weights):
        torch.nn.init.normal_(linear.weight)
    return attention


def test_points_start_at_a_place_on_every_level_and_offsets_have_its_unit():
    attention = make()
    query, features = torch.randn(2, 5, 8).double(), torch.randn(2, 16, 6).double()
    values = attention.values_of(features)
    centre = tuple(torch.rand(2, 5, 1, 2, 1).double() for _ in range(2))
    unit = tuple(torch.rand(2, 5, 1, 2, 1).double() for _ in range(2))
    offsets = attention.offsets(query).view(2, 5, 2, 2, 3, 2)
    weights = attention.weights(query).view(2, 5, 2, 6).softmax(-1)
    for factors, given in ((unit, unit), ((1.0, 1.0), None)):
        x, y = ((centre[i] + offsets[..., i] * factors[i]).flatten(3) for i in range(2))
        expected = attention.out(deform_attn(values.view(2, 16, 2, 2), SIZES, x, y, weights))
        torch.testing.assert_close(attention.read(query, values, SIZES, centre, given), expected)


def test_every_level_starts_alike_heads_looking_round_and_points_further_and_further():
    attention = DeformableAttention(8, 8, 8, num_heads=4, num_levels=2, num_points=2)
    start = attention.offsets.bias.view(4, 2, 2, 2)
    assert torch.equal(start[:, 0], start[:, 1])
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(2):
        torch.testing.assert_close(start[:, 0, point], expected * (point + 1))


def test_widths_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 channels do not divide into 4 heads"):
        DeformableAttention(8, 8, 6, num_heads=4)
