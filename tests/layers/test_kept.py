"""What is made of parameters is made again when they change, whichever way they are written."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from stepwell.layers.kept import Kept, can_keep


def doubled(kept, parameter, of=0):
    return kept(lambda: 2 * parameter.detach(), [parameter], of=of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.mul_(1.5),
        lambda p: p.data[-1, 0].add_(1),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: p.copy_(p.flip(1)),  # the same sums, but torch counts it
        lambda p: setattr(p, "data", torch.ones_like(p)),
    ],
)
def test_every_write_is_noticed(write, dtype):
    kept, parameter = Kept(), nn.Parameter(torch.arange(12).view(4, 3).to(dtype))
    with torch.no_grad():
        first = doubled(kept, parameter)
        assert doubled(kept, parameter) is first
        write(parameter)
        assert torch.equal(doubled(kept, parameter), 2 * parameter)


def test_the_smallest_change_is_noticed():
    """One that vanishes in a sum of floating-point numbers."""
    kept, parameter = Kept(), nn.Parameter(torch.tensor([[1e8, 1e-8]]))
    with torch.no_grad():
        doubled(kept, parameter)
        parameter.data[0, 1] = 2e-8
        assert torch.equal(doubled(kept, parameter), 2 * parameter)


def test_another_purpose_is_another_value():
    kept, parameter = Kept(), nn.Parameter(torch.ones(2))
    assert doubled(kept, parameter, of=0) is not doubled(kept, parameter, of=1)


def test_parameters_of_inference_mode_are_kept_too():
    with torch.inference_mode():
        kept, parameter = Kept(), nn.Parameter(torch.ones(2, 2))
        first = doubled(kept, parameter)
        assert doubled(kept, parameter) is first
        parameter.mul_(2)
        assert torch.equal(doubled(kept, parameter), 2 * parameter)


def test_the_old_value_is_gone_before_the_new_one_is_made():
    kept, parameter = Kept(), nn.Parameter(torch.ones(2))
    doubled(kept, parameter)
    parameter.data.add_(1)
    kept(lambda: _nothing_in(kept), [parameter], of=0)


def _nothing_in(kept):
    assert kept._kept is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_copies_begin_with_nothing(copied):
    kept = Kept()
    doubled(kept, nn.Parameter(torch.ones(2)))
    assert copied(kept)._kept is None
    kept.forget()
    assert kept._kept is None


def test_only_parameters_with_numbers_are_kept_and_no_gradient_is():
    parameter = nn.Parameter(torch.ones(2))
    assert not can_keep([parameter])
    with torch.no_grad():
        assert can_keep([parameter])
        assert not can_keep([parameter, torch.ones(2)])  # torch.func.functional_call puts such ones in
        assert not can_keep([nn.Parameter(torch.ones(2, device="meta"))])
        with torch._subclasses.FakeTensorMode():
            assert not can_keep([nn.Parameter(torch.ones(2))])
