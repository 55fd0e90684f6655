"""The neck of DINO: maps of one width, and coarser ones behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepwell.heads.channel_mapper import ChannelMapper
from stepwell.ops.double import Doubled, finished


@pytest.mark.parametrize("num_maps", [1, 2, 4])
def test_any_number_of_maps_is_filled_up_to_the_levels_each_half_of_the_last(num_maps):
    mapper = ChannelMapper([4, 6, 8, 10][:num_maps], 8, num_levels=4, num_groups=2)
    maps = [torch.randn(2, c, 20 >> i, 13 >> i) for i, c in enumerate([4, 6, 8, 10][:num_maps])]
    sizes = [tuple(x.shape[2:]) for x in maps]
    while len(sizes) < 4:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    assert [tuple(x.shape) for x in mapper(maps)] == [(2, 8, *size) for size in sizes]


def test_the_first_coarser_map_reads_what_comes_in_and_the_second_the_first():
    mapper = ChannelMapper([3, 5], 8, num_levels=4, num_groups=2)
    maps = [torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)]
    *_, third, fourth = mapper(maps)
    (conv, norm), (next_conv, next_norm) = mapper.extras
    expected = norm(F.conv2d(maps[1], conv.weight, stride=2, padding=1))
    torch.testing.assert_close(third, expected)
    torch.testing.assert_close(fourth, next_norm(F.conv2d(expected, next_conv.weight, stride=2, padding=1)))


def test_convolutions_start_within_xaviers_bounds():
    torch.manual_seed(0)
    mapper = ChannelMapper([64], 64, num_levels=2)
    for conv, fan in ((mapper.projections[0][0], 128), (mapper.extras[0][0], 128 * 9)):
        bound = (6 / fan) ** 0.5
        assert 0.95 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None


@pytest.mark.parametrize(
    ("dims", "dim", "words"),
    [([4] * 3, 8, "3 maps do not make 2 levels"), ([], 8, "0 maps"), ([4], 9, "9 does not divide into 2")],
)
def test_what_cannot_be_built_is_refused(dims, dim, words):
    with pytest.raises(ValueError, match=words):
        ChannelMapper(dims, dim, num_levels=2, num_groups=2)


def test_the_last_map_may_still_have_to_be_doubled():
    mapper = ChannelMapper([3, 5], 8, num_levels=3, num_groups=2)
    fine, pending = (
        torch.randn(1, 3, 8, 8),
        Doubled(torch.randn(1, 4, 2, 2), torch.randn(4, 5, 2, 2), torch.randn(5)),
    )
    torch.testing.assert_close(mapper([fine, pending]), mapper([fine, finished(pending)]))
