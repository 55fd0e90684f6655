"""A part at a time gives what all at once gives, and only where no gradient is wanted."""

from __future__ import annotations

import torch

from stepwell.ops.choose import prefer
from stepwell.ops.parts import in_parts


def test_parts_are_joined_in_order_whatever_is_left_over():
    x, y = torch.randn(2, 11, 3), torch.randn(2, 11, 3)
    sizes = []

    def joined(a, b):
        sizes.append(a.shape[1])
        return torch.cat([a, 2 * b], -1)

    with torch.no_grad():
        torch.testing.assert_close(in_parts(joined, x, y, most=8), torch.cat([x, 2 * y], -1))
        assert sizes == [4, 4, 3]
        with prefer("reference"):
            in_parts(joined, x, y, most=8)
    assert sizes == [4, 4, 3, 11]


def test_a_backward_pass_has_all_at_once():
    sizes = []
    x = torch.randn(1, 9, 2, requires_grad=True)
    in_parts(lambda tokens: sizes.append(tokens.shape[1]) or tokens.square(), x, most=4).sum().backward()
    assert sizes == [9]
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_a_backward_pass_may_compute_parts_again():
    """Values, and gradients of first and second order, of what the function takes by itself too."""
    sizes = []
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def cubed(tokens):
        sizes.append(tokens.shape[1])
        return (tokens * weight) ** 3

    out = in_parts(cubed, x, most=8, recompute=True)
    assert sizes == [4, 4, 1]
    torch.testing.assert_close(out, (x * weight) ** 3)
    grads = torch.autograd.grad(out.sum(), [x, weight], create_graph=True)
    assert sorted(sizes) == [1, 1, 4, 4, 4, 4]
    torch.testing.assert_close(grads[0], 3 * (x * weight) ** 2 * weight)
    torch.testing.assert_close(grads[1], (3 * (x * weight) ** 2 * x).sum((0, 1)))
    (second,) = torch.autograd.grad(grads[0].sum(), x)
    torch.testing.assert_close(second, 6 * x * weight**3)
