"""Facts about the perceptron, its activations, the scale after it, and norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from stepwell.layers.mlp import LayerScale, Mlp
from stepwell.layers.norm import build_norm
from stepwell.ops.parts import MOST


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("quick_gelu", "quick_gelu"), ("relu", "relu")],
)
def test_activations_are_what_transformers_calls_so(ours: str, theirs: str) -> None:
    mlp, x = Mlp(6, hidden_dim=11, activation=ours), torch.randn(4, 6) * 3
    torch.testing.assert_close(mlp(x), mlp.fc2(ACT2FN[theirs](mlp.fc1(x))))


def test_what_hooks_on_the_hidden_layer_have_seen_is_not_overwritten() -> None:
    mlp, x, hidden = Mlp(6, hidden_dim=11), torch.randn(4, 6), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    with torch.inference_mode():
        mlp(x)
        torch.testing.assert_close(hidden[0], nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias))


@pytest.mark.parametrize("shape", [(2, 5000, 4), (2, 50, 100, 4)])
def test_many_tokens_pass_in_parts_to_the_same_result(shape: tuple[int, ...]) -> None:
    mlp, x, sizes = Mlp(4, hidden_dim=6), torch.randn(shape), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1].numel()))
    whole = mlp(x)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), whole)
    assert sizes == [10000, MOST, 10000 - MOST]


def test_an_unknown_activation_or_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish'"):
        Mlp(4, hidden_dim=4, activation="swish")
    with pytest.raises(ValueError, match="'batchnorm'"):
        build_norm("batchnorm", 4, eps=1e-6)


def test_a_layer_scale_is_one_factor_per_channel_or_nothing() -> None:
    scale, x = LayerScale(3, init=0.1), torch.randn(2, 3)
    scale.gamma.data[2] = -2
    torch.testing.assert_close(scale(x), torch.tensor([0.1, 0.1, -2.0]) * x)
    bare = LayerScale(3, init=None)
    assert not list(bare.parameters())
    assert bare(x) is x


def test_rmsnorm_divides_by_the_root_mean_square_and_has_no_bias() -> None:
    norm, x = build_norm("rmsnorm", 6, eps=1e-6), torch.randn(5, 6) * 4 + 2
    norm.weight.data.uniform_(0.5, 2)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_of_half_precision_accumulate_in_single(kind: str) -> None:
    """300 squared 256 times is far past the largest fp16 number."""
    norm, x = build_norm(kind, 256, eps=1e-6), torch.full((1, 256), 300.0)
    x[0, ::2] *= -1
    out = norm.half()(x.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), x / 300, atol=2e-3, rtol=0)


def test_layernorm_is_torchs_so_that_counters_see_it() -> None:
    assert type(build_norm("layernorm", 4, eps=1e-5)) is nn.LayerNorm
