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
