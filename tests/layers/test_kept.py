"""What is made of parameters is made again when they change, whichever way they are written."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from stepwell.layers import kept as kept_file
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


WHOLE = {2: torch.int16, 4: torch.int32}
WRITES = {
    "twice": lambda p: p.mul_(2),
    "half": lambda p: p.mul_(0.5),
    "negated": lambda p: p.neg_(),
    "every second column negated": lambda p: p[:, 1::2].neg_(),
    "two columns negated": lambda p: p[:, 1:4:2].neg_(),
    "turned": lambda p: p.copy_(p.flip(1)),
    "rolled": lambda p: p.copy_(p.roll(4, 1)),
    "rows of equal sums swapped": lambda p: p[:2].copy_(p[:2].flip(0)),
    "two numbers swapped": lambda p: p[3, :2].copy_(p[3, :2].flip(0)),
    "one number by its last bit": lambda p: p.view(WHOLE[p.element_size()])[5, 1].add_(1),
    "the last number": lambda p: p[-1, -1].mul_(3),
}


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 512, 1024])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_torch_does_not_count_is_noticed(name, width, dtype, made_in):
    with made_in():
        torch.manual_seed(0)
        values = torch.randn(8, width)
        values[1] = values[0].flip(0)
        kept, parameter = Kept(), nn.Parameter(values.to(dtype))
        first = doubled(kept, parameter)
        before = parameter.clone()
        assert doubled(kept, parameter) is first
        WRITES[name](parameter.data)
        assert not torch.equal(parameter, before)
        assert torch.equal(doubled(kept, parameter), 2 * parameter)


@pytest.mark.parametrize("name", ["negated", "two numbers swapped", "turned", "rows of equal sums swapped"])
def test_writes_are_noticed_where_lanes_hold_many_places(name, monkeypatch):
    """As those of a large parameter do; and beyond as many places as there are numbers."""
    monkeypatch.setattr(kept_file, "FEWEST_LANES", 2)
    for rows in (8, 2 * len(kept_file.NUMBERS)):
        values = torch.randn(rows, 16)
        values[1] = values[0].flip(0)
        kept, parameter = Kept(), nn.Parameter(values)
        with torch.no_grad():
            doubled(kept, parameter)
            WRITES[name](parameter.data)
            assert torch.equal(doubled(kept, parameter), 2 * parameter)


def test_sums_of_a_fingerprint_are_exact():
    """The largest words there are, in every place of every lane."""
    assert 2**31 * sum(kept_file.NUMBERS) < 2**53
    assert len(set(kept_file.NUMBERS)) == len(kept_file.NUMBERS)
    assert all(number % 2 for number in kept_file.NUMBERS)


def test_a_parameter_may_lie_anywhere_in_its_memory():
    """Off the bounds of words, as parts of a flat one do, and not in one piece."""
    flat = torch.randn(4, 33, dtype=torch.float32).bfloat16()
    for view in (flat.flatten()[1:12], flat[:, 1:4], flat.t(), flat[0, :0], flat[0, 0]):
        kept, parameter = Kept(), nn.Parameter(view)
        with torch.no_grad():
            first = doubled(kept, parameter)
            assert doubled(kept, parameter) is first
            parameter.data.neg_()
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
