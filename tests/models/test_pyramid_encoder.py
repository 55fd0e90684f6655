"""Pyramids of encoders: which layers run, who sees which view."""

from __future__ import annotations

import pytest
import torch
from pyramids import make_pyramid, make_views, vit

from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.piip import PiipConfig
from stepwell.models.pyramid import BranchConfig, PyramidEncoder, build_interactions


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
    interactions = build_interactions([b.spec for b in branches], ranges, InteractionConfig(num_heads=2))
    (final,) = PyramidEncoder(branches, interactions, ranges)(make_views(ratios=(0.5, 1.0)))
    assert final[0].class_token.shape == (2, 1, 16)
    assert final[1].class_token is None


def test_recomputing_gives_the_same_gradients():
    views, gradients = make_views(ratios=(0.5, 1.0)), []
    for checkpointing in (False, True):
        encoder = make_pyramid((16, 8)).train()
        encoder.gradient_checkpointing = checkpointing
        (final,) = encoder(views)
        sum(s.tokens.square().sum() for s in final).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("ranges", [[(1, 3)], [(0, 4)], [(0, 1), (1, 2)], [(0, 1), (3, 3)], [(0, -1)]])
def test_ranges_that_leave_layers_out_or_do_not_exist_are_refused(ranges):
    with pytest.raises(ValueError, match="must adjoin from 0 on and fit into 4 layers, got"):
        BranchConfig(encoder="vit_nano", size=64, interactions=ranges)


def test_a_network_made_shorter_takes_fewer_layers():
    with pytest.raises(ValueError, match=r"fit into 2 layers, got \(\(0, 3\),\)"):
        BranchConfig(encoder="vit_nano", size=64, interactions=[(0, 3)], arguments={"depth": 2})


@pytest.mark.parametrize("settings", [PiipConfig, DenseSettings, ClassifierSettings])
def test_branches_meet_equally_often(settings):
    branches = [
        BranchConfig(encoder="vit_nano", size=64, interactions=r) for r in ([(0, 3)], [(0, 1), (2, 3)])
    ]
    with pytest.raises(ValueError, match=r"same number of interactions, got \[1, 2\]"):
        settings(branches=branches)
    with pytest.raises(ValueError, match="at least 1"):
        settings(branches=[])
