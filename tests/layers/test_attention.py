"""Facts about self-attention on a grid, its windows and its padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from stepwell.layers.attention import SelfAttention, attention
from stepwell.ops.choose import prefer


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    return module.eval()


def with_torch(layer: SelfAttention, tokens: Tensor) -> Tensor:
    """The same weights in torch's own multi-head attention, global."""
    dim = tokens.shape[-1]
    theirs = nn.MultiheadAttention(dim, layer.num_heads, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = layer.qkv.weight.data, layer.qkv.bias.data
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    return theirs(tokens, tokens, tokens, need_weights=False)[0]


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_global_attention_is_torchs_multi_head_attention(path: str) -> None:
    layer, tokens = randomised(SelfAttention(24, num_heads=3)), torch.randn(2, 1 + 5 * 7, 24)
    with prefer(path):
        torch.testing.assert_close(layer(tokens, (5, 7)), with_torch(layer, tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("padding", ["tokens", "qkv"])
def test_windows_that_divide_the_grid_see_only_themselves(path: str, padding: str) -> None:
    layer = randomised(SelfAttention(16, num_heads=2, window=3, window_padding=padding))
    grid = torch.randn(2, 6, 9, 16)
    with prefer(path):
        out = layer(grid.flatten(1, 2), (6, 9)).unflatten(1, (6, 9))
    for r in range(0, 6, 3):
        for c in range(0, 9, 3):
            alone = with_torch(layer, grid[:, r : r + 3, c : c + 3].flatten(1, 2))
            torch.testing.assert_close(
                out[:, r : r + 3, c : c + 3].flatten(1, 2), alone, atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_padded_tokens_are_zeros_that_take_part(path: str) -> None:
    layer = randomised(SelfAttention(16, num_heads=2, window=4))
    grid = torch.randn(1, 3, 5, 16)
    padded = torch.zeros(1, 4, 8, 16)
    padded[:, :3, :5] = grid
    with prefer(path):
        out = layer(grid.flatten(1, 2), (3, 5)).unflatten(1, (3, 5))
    right = with_torch(layer, padded[:, :, 4:].flatten(1, 2)).unflatten(1, (4, 4))
    torch.testing.assert_close(out[:, :, 4:], right[:, :3, :1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_padded_qkv_only_dilutes_the_softmax(path: str) -> None:
    """Zero keys have logit 0 and zero values add nothing: a 1 x 1 grid in a window of 2 has three of them."""
    layer = randomised(SelfAttention(8, num_heads=1, window=2, window_padding="qkv"))
    token = torch.randn(1, 1, 8)
    q, k, v = layer.qkv(token).chunk(3, dim=-1)
    own = torch.exp((q * k).sum() / 8**0.5)
    expected = layer.proj(v * own / (own + 3))
    with prefer(path):
        torch.testing.assert_close(layer(token, (1, 1)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("padding", ["tokens", "qkv"])
def test_fast_and_reference_agree_with_their_gradients(padding: str, qk_norm: bool) -> None:
    layer = randomised(SelfAttention(16, num_heads=2, window=4, window_padding=padding, qk_norm=qk_norm))
    tokens = torch.randn(2, 16, 33).transpose(1, 2)[:, :30].requires_grad_()  # strided
    results = []
    for path in ("reference", "fast"):
        with prefer(path):
            out = layer(tokens, (5, 6))
        results.append([out, *torch.autograd.grad(out.square().sum(), [tokens, *layer.parameters()])])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_half_precision_stays_near_single() -> None:
    layer = randomised(SelfAttention(16, num_heads=2, window=4))
    tokens = torch.randn(2, 30, 16)
    expected = layer(tokens, (5, 6))
    for dtype in (torch.bfloat16, torch.float16):
        out = layer.to(dtype)(tokens.to(dtype), (5, 6))
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < 0.02 * expected.abs().max()
        layer.float()


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_attention_in_bf16_does_not_round_its_logits(path: str) -> None:
    """Of a standard deviation of 9: rounded to bf16 they would cost several times this error."""
    q, k, v = (torch.randn(2, 4, 196, 64).mul(c).bfloat16() for c in (3, 3, 1))
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    with prefer(path):
        error = attention(q, k, v).double() - exact
    assert error.square().mean().sqrt() < 3e-3


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("biased", [False, True])
def test_second_derivatives_of_attention_are_numeric_ones(path: str, biased: bool) -> None:
    q, k, v, bias = (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    with prefer(path):
        assert gradgradcheck(lambda *t: attention(*t, bias[0] if biased else None), (q, k, v))
        assert gradgradcheck(lambda x: attention(x, x, v), (k,))  # one tensor in two roles


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("path", ["reference", "fast"])
def test_no_images_give_no_tokens(path: str, window: int) -> None:
    layer = SelfAttention(8, num_heads=2, window=window)
    with prefer(path):
        assert layer(torch.randn(0, 15, 8), (3, 5)).shape == (0, 15, 8)


@pytest.mark.parametrize("dtypes", ["fff", "bbb", "ffb", "bbf"])
@pytest.mark.parametrize("biased", [False, True])
def test_autocast_and_mixed_dtypes_are_alike_on_both_paths(dtypes: str, biased: bool) -> None:
    """Autocast is for linear layers; what reaches attention in single precision stays so."""
    kinds = {"f": torch.float32, "b": torch.bfloat16}
    q, k, v = (torch.randn(2, 2, 5, 4).to(kinds[kind]) for kind in dtypes)
    bias, outs = torch.randn(2, 5, 5) if biased else None, []
    for path in ("reference", "fast"):
        with prefer(path), torch.autocast("cpu", torch.bfloat16):
            outs.append(attention(q, k, v, bias))
    assert outs[0].dtype == outs[1].dtype == v.dtype
    close = 1e-6 if v.dtype == torch.float32 else 2**-5
    torch.testing.assert_close(outs[1], outs[0], atol=close, rtol=close)
    torch.testing.assert_close(outs[1], attention(q, k, v, bias), atol=0, rtol=0)


def test_queries_and_keys_are_normalised_over_the_full_width() -> None:
    """Scaling all queries and keys changes nothing, scaling one head against the other does."""
    layer, tokens = (
        randomised(SelfAttention(16, num_heads=2, qk_norm=True, qkv_bias=False)),
        torch.randn(1, 12, 16),
    )
    before = layer(tokens, (3, 4))
    layer.qkv.weight.data[:32] *= 7
    torch.testing.assert_close(layer(tokens, (3, 4)), before, atol=1e-4, rtol=1e-4)
    layer.qkv.weight.data[:8] *= 7
    assert (layer(tokens, (3, 4)) - before).abs().max() > 0.01


def test_relative_bias_is_added_per_head_to_query_and_key() -> None:
    layer = randomised(SelfAttention(16, num_heads=2, window=2, relative_grid=(2, 2)))
    tokens = torch.randn(1, 4, 16)
    q, k, v = (x.view(1, 4, 2, 8).transpose(1, 2) for x in layer.qkv(tokens).chunk(3, dim=-1))
    bias = torch.empty(2, 4, 4)
    for query in range(4):
        for key in range(4):
            down, right = query // 2 - key // 2, query % 2 - key % 2
            bias[:, query, key] = layer.relative_table[(down + 1) * 3 + right + 1]
    mixed = attention(q, k, v, bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(tokens, (2, 2)), layer.proj(mixed), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dim": 10, "num_heads": 4}, "10 is not a multiple of 4 heads"),
        ({"dim": 8, "num_heads": 2, "window": -1}, "got -1"),
        ({"dim": 8, "num_heads": 2, "window_padding": "zeros"}, "'zeros'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SelfAttention(**arguments)


def test_a_global_layer_with_relative_positions_refuses_another_grid() -> None:
    layer = SelfAttention(8, num_heads=2, relative_grid=(3, 3))
    with pytest.raises(ValueError, match=r"\(3, 3\) grid and got \(3, 4\)"):
        layer(torch.randn(1, 12, 8), (3, 4))
