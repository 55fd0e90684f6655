"""One stride becomes four."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepwell.heads.neck import SimplePyramid
from stepwell.ops.double import Doubled, finished


def test_four_maps_of_four_sizes_from_one():
    x = torch.randn(2, 8, 4, 6)
    pyramid = SimplePyramid([8] * 4, num_groups=2)
    maps = pyramid(x)
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert maps[2] is x
    torch.testing.assert_close(maps[3], F.max_pool2d(x, 2))
    double = pyramid.stages[1][0]
    torch.testing.assert_close(maps[1], F.conv_transpose2d(x, double.weight, double.bias, stride=2))


def test_four_times_up_normalises_between_two_doublings():
    x = torch.randn(1, 8, 2, 3)
    first, norm, _, second = SimplePyramid([8], operations=["up4"], num_groups=4).stages[0]
    between = F.gelu(
        F.group_norm(F.conv_transpose2d(x, first.weight, first.bias, stride=2), 4, norm.weight, norm.bias)
    )
    expected = F.conv_transpose2d(between, second.weight, second.bias, stride=2)
    torch.testing.assert_close(second(F.gelu(norm(first(x)))), expected)


def test_every_operation_may_have_a_map_and_a_width_of_its_own():
    maps = [torch.randn(1, dim, 4, 4) for dim in (8, 4, 2)]
    out = SimplePyramid([8, 4, 2], operations=["up2", "same", "maxpool2"])(maps)
    assert [tuple(m.shape[1:]) for m in out] == [(8, 8, 8), (4, 4, 4), (2, 2, 2)]


def test_baselines_have_a_layer_norm_over_channels():
    pyramid = SimplePyramid([8], operations=["up4"], norm="layernorm")
    norm = pyramid.stages[0][1]
    x = torch.randn(2, 8, 3, 2)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_maps_may_leave_before_they_are_doubled_last():
    pyramid, x = SimplePyramid([8] * 4, num_groups=2), torch.randn(2, 8, 4, 6)
    unfinished = [pyramid.unfinished(i, x) for i in range(4)]
    assert [isinstance(m, Doubled) for m in unfinished] == [True, True, False, False]
    for ours, expected in zip(unfinished, pyramid(x), strict=True):
        assert torch.equal(finished(ours), expected)


def test_a_doubling_that_somebody_listens_to_is_done():
    pyramid, heard = SimplePyramid([8] * 4, num_groups=2), []
    pyramid.stages[0][-1].register_forward_hook(lambda *call: heard.append(call[2].shape))
    assert not isinstance(pyramid.unfinished(0, torch.randn(1, 8, 4, 6)), Doubled)
    assert heard == [(1, 8, 16, 24)]
    pyramid.stages[1].register_forward_hook(lambda *call: heard.append(call[2].shape))
    assert not isinstance(pyramid.unfinished(1, torch.randn(1, 8, 4, 6)), Doubled)
    assert heard[1:] == [(1, 8, 8, 12)]


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation 'down2'"):
        SimplePyramid([8], operations=["down2"])
