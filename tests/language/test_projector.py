"""Projectors by name. That they equal the official ones is held by tests/parity/test_verify.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepwell.language.projector import build_projector


@pytest.mark.parametrize("linears", [1, 2, 4])
def test_mlp_is_linears_with_exact_gelu_between(linears: int) -> None:
    module = build_projector(f"mlp{linears}x_gelu", 6, 8)
    weights = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in weights] == [6] + [8] * (linears - 1)
    tokens = torch.randn(2, 3, 6)
    expected = weights[0](tokens)
    for layer in weights[1:]:
        expected = layer(0.5 * expected * (1 + torch.erf(expected / 2**0.5)))
    torch.testing.assert_close(module(tokens), expected)


def test_identity_passes_tokens_and_keeps_the_width() -> None:
    tokens = torch.randn(2, 3, 6)
    assert build_projector("identity", 6, 6)(tokens) is tokens
    with pytest.raises(ValueError, match="cannot turn width 6 into 8; use 'linear'"):
        build_projector("identity", 6, 8)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", "Linear", ""])
def test_unknown_kinds_are_answered_with_those_there_are(kind: str) -> None:
    with pytest.raises(ValueError, match="choose 'linear', 'mlp2x_gelu'"):
        build_projector(kind, 6, 8)
