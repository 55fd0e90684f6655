"""The mixture-of-resolution adapter does what LLaVA-HR says, and nothing before it has learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stepwell.fuse.mixture import MixtureAdapter, MixtureMerge, to_grid

DIM, SLOW_DIM = 8, 6
SIZES = [((3, 5), (3, 5)), ((6, 9), (3, 5)), ((4, 6), (8, 12)), ((5, 4), (5, 2))]
"""Of the fast grid and of the slow one: alike, finer, coarser, finer one way."""


def opened(module):
    """Layers that start at zero would hide what they do."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def features(size, slow_size, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, size[0] * size[1], DIM), torch.randn(batch, SLOW_DIM, *slow_size)


def on_grid(x, size):
    """Cell by cell as numpy has it: means of whole blocks, or lines between the outermost cells."""
    x = x.detach().numpy()
    if x.shape[2] > size[0]:
        rows, cols = x.shape[2] // size[0], x.shape[3] // size[1]
        return torch.from_numpy(x.reshape(*x.shape[:2], size[0], rows, size[1], cols).mean((3, 5)))
    for axis, length in ((2, size[0]), (3, size[1])):
        at, known = np.linspace(0, x.shape[axis] - 1, length), np.arange(x.shape[axis])
        x = np.apply_along_axis(lambda line, at=at, known=known: np.interp(at, known, line), axis, x)
    return torch.from_numpy(x).float()


def adapted(adapter, tokens, size, slow):
    """The spec's four steps in plain convolutions and products."""
    w = {name: parameter.detach() for name, parameter in adapter.named_parameters()}

    def cell(x, name):
        return F.conv2d(x, w[f"{name}.weight"][:, :, None, None], w[f"{name}.bias"])

    f = tokens.reshape(len(tokens), *size, DIM).permute(0, 3, 1, 2)
    s = on_grid(cell(F.gelu(cell(slow, "slow.0")), "slow.2"), size)
    around = F.conv2d(f, w["local.0.weight"], w["local.0.bias"], padding=3, groups=DIM)
    f = f + cell(F.gelu(around), "local.2")
    means = torch.cat([f, s], 1).flatten(2).mean(2)
    hidden = F.gelu(means @ w["gate.0.weight"].T + w["gate.0.bias"])
    gate = torch.tanh(hidden @ w["gate.2.weight"].T + w["gate.2.bias"])
    return (f + gate[:, :, None, None] * s).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("size", "slow_size"), SIZES)
def test_an_adapter_is_the_four_steps_of_the_paper(size, slow_size):
    adapter = opened(MixtureAdapter(DIM, SLOW_DIM))
    tokens, slow = features(size, slow_size)
    expected = adapted(adapter, tokens, size, slow)
    torch.testing.assert_close(adapter(tokens, size, slow), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "slow_size"), SIZES)
def test_a_merge_adds_both_behind_a_layer_of_their_own(size, slow_size):
    merge = opened(MixtureMerge(DIM, SLOW_DIM))
    tokens, slow = features(size, slow_size)
    expected = F.linear(tokens, merge.fast.weight, merge.fast.bias)
    seen = on_grid(slow, size).flatten(2).transpose(1, 2)
    expected = expected + F.linear(seen, merge.slow.weight, merge.slow.bias)
    torch.testing.assert_close(merge(tokens, size, slow), expected, atol=1e-5, rtol=1e-5)


def test_a_map_of_the_same_grid_is_left_alone_and_half_precision_is_rounded_once():
    x = torch.randn(1, 3, 37, 20).bfloat16()
    assert to_grid(x, (37, 20)) is x
    for size in ((101, 64), (5, 3)):
        assert torch.equal(to_grid(x, size), to_grid(x.float(), size).bfloat16())


def test_a_new_adapter_changes_nothing():
    tokens, slow = features((6, 9), (3, 5))
    adapter = MixtureAdapter(DIM, SLOW_DIM)
    assert torch.equal(adapter(tokens, (6, 9), slow), tokens)
    opened(adapter).reset_parameters()
    assert torch.equal(adapter(tokens, (6, 9), slow), tokens)


def test_a_new_adapter_learns_at_once_and_its_gate_as_soon_as_there_is_something_behind_it():
    tokens, slow = features((6, 9), (3, 5))
    adapter = MixtureAdapter(DIM, SLOW_DIM)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimiser.zero_grad()
        adapter(tokens, (6, 9), slow).square().sum().backward()
        moved.append({n.split(".")[0] for n, p in adapter.named_parameters() if p.grad.abs().sum() > 0})
        optimiser.step()
    assert moved == [{"local", "slow"}, {"local", "slow", "gate"}]


def test_every_image_has_a_gate_of_its_own():
    adapter = opened(MixtureAdapter(DIM, SLOW_DIM))
    tokens, slow = features((6, 9), (3, 5), batch=3)
    together = adapter(tokens, (6, 9), slow)
    for i in range(3):
        alone = adapter(tokens[i : i + 1], (6, 9), slow[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)


def test_half_precision_stays_close():
    adapter, merge = opened(MixtureAdapter(DIM, SLOW_DIM)), opened(MixtureMerge(DIM, SLOW_DIM))
    tokens, slow = features((6, 9), (3, 5))
    for module in (adapter, merge):
        expected = module(tokens, (6, 9), slow)
        half = module.bfloat16()(tokens.bfloat16(), (6, 9), slow.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.05)
