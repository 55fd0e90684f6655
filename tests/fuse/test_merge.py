"""Maps of several branches, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepwell.fuse.merge import (
    BranchMerge,
    LastMap,
    ProjectorConfig,
    TokenMerge,
    dense_stacks,
    linear_stacks,
    resize_map,
    stage_stacks,
)
from stepwell.layers.position import fraction_position_embedding
from stepwell.ops.resize import cut_from_map

DIMS, SIZES = (8, 4, 4), ((2, 3), (3, 5), (4, 6))


def make_maps(dims=DIMS, sizes=SIZES):
    return [torch.randn(2, dim, *size) for dim, size in zip(dims, sizes, strict=True)]


def test_weighted_sum_on_the_last_branchs_grid():
    maps = make_maps((4, 4, 4))
    merge = BranchMerge([nn.Identity()] * 3)
    with torch.no_grad():
        merge.weights.copy_(torch.tensor([2.0, -1.0, 0.5]))
    resized = [F.interpolate(x, (4, 6), mode="bilinear", align_corners=False) for x in maps]
    torch.testing.assert_close(merge(maps), 2 * resized[0] - resized[1] + 0.5 * resized[2])
    assert merge(maps, (7, 2)).shape == (2, 4, 7, 2)


def test_any_subset_of_branches_still_lands_on_the_last_grid():
    maps = make_maps((4, 4, 4))
    merge = BranchMerge([nn.Identity()], branches=[0])
    torch.testing.assert_close(merge(maps), resize_map(maps[0], (4, 6)))


def test_dense_stacks_have_two_convolutions_in_every_branch():
    stacks = dense_stacks(DIMS, num_groups=2)
    for stack, dim in zip(stacks, DIMS, strict=True):
        convs = [m for m in stack if isinstance(m, nn.Conv2d)]
        assert [(m.in_channels, m.out_channels, m.bias) for m in convs] == [(dim, 8, None), (8, 8, None)]
    x = make_maps()[1]
    conv1, norm1, _, conv2, norm2, _ = stacks[1]
    once = F.relu(F.group_norm(F.conv2d(x, conv1.weight, padding=1), 2, norm1.weight, norm1.bias))
    twice = F.relu(F.group_norm(F.conv2d(once, conv2.weight, padding=1), 2, norm2.weight, norm2.bias))
    torch.testing.assert_close(stacks[1](x), twice)


def test_stage_stacks_leave_the_first_branch_without_convolution():
    stacks = stage_stacks(DIMS, num_groups=2)
    assert [sum(isinstance(m, nn.Conv2d) for m in stack) for stack in stacks] == [0, 1, 1]
    maps = make_maps()
    torch.testing.assert_close(stacks[0](maps[0]), F.relu(F.group_norm(maps[0], 2)))
    assert BranchMerge(stacks)(maps).shape == (2, 8, 4, 6)


def test_linear_stacks_normalise_before_and_after_the_projection():
    first, second, _ = linear_stacks(DIMS, num_groups=2)
    maps = make_maps()
    torch.testing.assert_close(first(maps[0]), F.group_norm(maps[0], 2))
    linear = second[1]
    projected = (
        torch.einsum("ec,bchw->behw", linear.weight, F.group_norm(maps[1], 2)) + linear.bias[:, None, None]
    )
    torch.testing.assert_close(second(maps[1]), F.group_norm(projected, 2))


def test_bilinear_resize_is_exact_in_half_precision_up_to_one_rounding():
    x = torch.randn(1, 3, 5, 4).bfloat16()
    assert torch.equal(resize_map(x, (9, 7)), resize_map(x.float(), (9, 7)).bfloat16())
    assert resize_map(x, (5, 4)) is x


@pytest.mark.parametrize("norm", ["groupnorm", "layernorm"])
@pytest.mark.parametrize("grid", [None, (3, 2)])
def test_tokens_are_resized_first_and_summed_without_weights(norm, grid):
    merge = TokenMerge(DIMS, 6, ProjectorConfig(hidden_dim=8, norm=norm, num_groups=4, grid=grid))
    maps = make_maps()
    total = 0
    for stack, x in zip(merge.stacks, maps, strict=True):
        first, normed, _, second = stack
        x = F.interpolate(x, grid or (4, 6), mode="bilinear", align_corners=False)
        x = F.conv2d(x, first.weight[:, :, None, None], first.bias)
        if norm == "groupnorm":
            x = F.group_norm(x, 4, normed.weight, normed.bias)
        else:
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        total = total + F.conv2d(F.gelu(x), second.weight[:, :, None, None], second.bias)
    tokens, size, *_ = merge(maps)
    assert size == (grid or (4, 6))
    torch.testing.assert_close(tokens, total.flatten(2).transpose(1, 2))


def test_the_embedding_of_a_place_is_added_to_its_token_by_the_weight_given():
    config = ProjectorConfig(hidden_dim=8, num_groups=4, grid=(3, 5))
    plain, placed = TokenMerge(DIMS, 8, config), TokenMerge(DIMS, 8, replace(config, place=0.5))
    finer = TokenMerge(DIMS, 8, replace(config, place=0.5, place_shortest=0.01))
    maps = make_maps()
    boxes = torch.tensor([[0.1, 0.2, 0.15, 0.22]]).expand(len(maps[0]), -1)
    for merge, shortest in ((placed, 0.07), (finer, 0.01)):
        merge.load_state_dict(plain.state_dict())
        added = merge(maps).tokens - plain(maps).tokens
        expected = 0.5 * fraction_position_embedding(8, (3, 5), shortest=shortest)
        torch.testing.assert_close(added, expected.expand_as(added), atol=1e-5, rtol=1e-4)
        added = merge(maps, boxes).tokens - plain(maps, boxes).tokens
        expected = 0.5 * fraction_position_embedding(8, (3, 5), boxes, shortest=shortest)
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid", [None, (3, 2)])
def test_tokens_of_a_cut_hold_what_the_other_branches_saw_there(grid):
    config = ProjectorConfig(hidden_dim=8, num_groups=4, grid=grid, place=0.5)
    merge, maps = TokenMerge(DIMS, 8, config), make_maps()
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(maps[0]), -1)
    torch.testing.assert_close(merge(maps, whole).tokens, merge(maps).tokens, rtol=1e-4, atol=1e-5)
    boxes = torch.rand(len(maps[0]), 4) * 0.4 + torch.tensor([0.0, 0.1, 0.5, 0.5])
    size = grid or (maps[-1].shape[-2], maps[-1].shape[-1])
    cut = [*(cut_from_map(x, size, boxes) for x in maps[:-1]), resize_map(maps[-1], size)]
    bare = TokenMerge(DIMS, 8, replace(config, place=0.0))
    bare.load_state_dict(merge.state_dict())
    added = merge(maps, boxes).tokens - bare(cut).tokens
    expected = 0.5 * fraction_position_embedding(8, size, boxes)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_with_numbers():
    with pytest.raises(ValueError, match="width 6 does not divide into 32 groups"):
        TokenMerge(DIMS, 6, ProjectorConfig())
    with pytest.raises(ValueError, match="'groupnorm' or 'layernorm'"):
        ProjectorConfig(norm="batchnorm")
    with pytest.raises(ValueError, match="shorter"):
        TokenMerge(DIMS, 32, ProjectorConfig())(make_maps()[:2])


def test_last_map_is_no_merge_at_all():
    maps = make_maps()
    assert LastMap()(maps) is maps[-1]
