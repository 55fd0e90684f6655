"""Class logits from the states of several branches."""

from __future__ import annotations

import pytest
import torch

from stepwell.fuse.merge import BranchMerge, linear_stacks
from stepwell.heads.classify import BranchHeads, MergedHead
from stepwell.structures import TokenMap

DIMS = (12, 8)


def make_states(class_tokens=True):
    return [
        TokenMap(torch.randn(3, 6, dim), (2, 3), torch.randn(3, 1, dim) if class_tokens else None)
        for dim in DIMS
    ]


@pytest.mark.parametrize("read", ["first_patch", "cls"])
def test_logits_are_the_mean_over_branches_of_what_one_token_says(read):
    heads, states = BranchHeads(DIMS, 5, read=read), make_states()
    tokens = [s.tokens[:, 0] if read == "first_patch" else s.class_token[:, 0] for s in states]
    expected = sum(
        classifier(norm(token))
        for classifier, norm, token in zip(heads.classifiers, heads.norms, tokens, strict=True)
    )
    torch.testing.assert_close(heads(states), expected / 2)


def test_reading_a_class_token_needs_one():
    with pytest.raises(ValueError, match="no class token"):
        BranchHeads(DIMS, 5, read="cls")(make_states(class_tokens=False))
    with pytest.raises(ValueError, match="'first_patch' or 'cls'"):
        BranchHeads(DIMS, 5, read="mean")


def test_merged_head_averages_normalised_tokens_of_one_map():
    merge = BranchMerge(linear_stacks(DIMS, num_groups=2))
    head, states = MergedHead(merge, 12, 5), make_states()
    maps = [s.tokens.transpose(1, 2).reshape(3, -1, 2, 3) for s in states]
    tokens = head.norm(merge(maps).permute(0, 2, 3, 1))
    torch.testing.assert_close(head(states), head.classifier(tokens.mean((1, 2))))
