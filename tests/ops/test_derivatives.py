"""A fast twin's own gradient, and the reference's where a gradient is differentiated."""

from __future__ import annotations

import torch

from stepwell.ops.derivatives import with_derivatives_of


def test_the_first_gradient_is_the_fast_ones_and_the_reference_serves_those_that_are_recorded() -> None:
    calls = []

    def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append("reference")
        return x**2 * y**3

    x, y = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    out = with_derivatives_of(reference, (x, y), 10 * x)  # a twin whose slope gives it away
    assert torch.autograd.grad(out, x, retain_graph=True)[0] == 10
    assert not calls
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    assert slope == 2 * 2 * 27
    assert torch.autograd.grad(slope, x)[0] == 2 * 27


def test_without_a_gradient_nothing_is_added() -> None:
    out = torch.ones(2)
    assert with_derivatives_of(torch.mul, (out, out), out) is out


def test_a_tensor_in_two_roles_has_a_gradient_in_each() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    out = with_derivatives_of(torch.mul, (x, x), x * x)
    assert torch.autograd.grad(out, x, create_graph=True)[0] == 2 * 3
