"""torch's convolution, which learns from maps that lie channel behind channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stepwell.layers.conv import Conv2d
from stepwell.ops.choose import prefer


@pytest.fixture
def seen(monkeypatch):
    """Whether each map that is convolved lies channel behind channel."""
    convolve, layouts = F.conv2d, []
    monkeypatch.setattr(F, "conv2d", lambda x, *rest: layouts.append(x.is_contiguous()) or convolve(x, *rest))
    return layouts


def tokens_as_map() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 30, 4, dtype=torch.float64).transpose(1, 2).unflatten(2, (5, 6))


@pytest.mark.parametrize(
    ("path", "learns", "grad", "is_copied"),
    [
        ("auto", True, True, True),
        ("fast", True, True, True),
        ("reference", True, True, False),
        ("auto", False, True, False),
        ("auto", True, False, False),
    ],
)
def test_a_map_of_tokens_is_copied_where_the_kernel_learns(seen, path, learns, grad, is_copied):
    conv = Conv2d(4, 3, 3, padding=1).double().requires_grad_(learns)
    x = tokens_as_map()
    assert not x.is_contiguous()
    with prefer(path), torch.set_grad_enabled(grad):
        out = conv(x)
    assert seen == [is_copied]
    torch.testing.assert_close(out, torch.conv2d(x, conv.weight, conv.bias, padding=1))


def test_gradients_are_torchs():
    conv, x = Conv2d(4, 3, 3, padding=1).double(), tokens_as_map().requires_grad_()
    theirs = nn.Conv2d(4, 3, 3, padding=1).double()
    theirs.load_state_dict(conv.state_dict())
    grads = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    ours = torch.autograd.grad(conv(x), [x, *conv.parameters()], grads)
    for mine, expected in zip(
        ours, torch.autograd.grad(theirs(x), [x, *theirs.parameters()], grads), strict=True
    ):
        torch.testing.assert_close(mine, expected)
