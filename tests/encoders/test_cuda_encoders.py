"""Encoders on a GPU give what they give on a CPU, in fp32 and nearly so in half precision."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from test_convnext import convnext
from test_vit import FAMILIES, vit
from torch import Tensor, nn

pytestmark = pytest.mark.cuda
ENCODERS = [*FAMILIES, "convnext"]


def build(name: str) -> nn.Module:
    model = convnext(layer_scale=0.1) if name == "convnext" else vit(**FAMILIES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3  # sharp softmaxes would blow up what rounding does
    return model


def image(device: torch.device) -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).to(device)


def with_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    tokens = model(x).tokens.float()
    model.zero_grad()
    (tokens * torch.linspace(-1, 1, tokens.numel()).view(tokens.shape).to(tokens)).sum().backward()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"tokens": tokens.detach(), "image": x.grad, **gradients}


def distance(ours: Tensor, expected: Tensor) -> float:
    """By the size of what is expected."""
    return float((ours.float().cpu() - expected.cpu()).norm() / expected.norm().clamp(min=1e-6).cpu())


def furthest(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max(distance(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_and_gradients_are_those_of_a_cpu(name, cuda):
    model = build(name)
    expected = with_gradients(model, image(torch.device("cpu")))
    assert len(expected) > 10
    assert furthest(with_gradients(model.to(cuda), image(cuda)), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENCODERS)
def test_half_precision_is_near_by_autocast_and_by_weights(name, dtype, cuda):
    model, x = build(name).to(cuda), image(cuda)
    expected = model(x).tokens.detach()
    with torch.autocast(cuda.type, dtype):
        cast = with_gradients(model, x)
    assert all(tensor.isfinite().all() for tensor in cast.values())
    with torch.no_grad():
        half = copy.deepcopy(model).to(dtype)(x.to(dtype)).tokens
    assert half.dtype == dtype
    assert distance(cast["tokens"], expected) < 0.05
    assert distance(half, expected) < 0.05


@pytest.mark.parametrize("name", ENCODERS)
def test_channels_last_memory_changes_nothing(name, cuda):
    model, x = build(name).to(cuda), image(cuda)
    expected = with_gradients(model, x)
    strided = model.to(memory_format=torch.channels_last)
    assert furthest(with_gradients(strided, x.to(memory_format=torch.channels_last)), expected) < 1e-4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_gives_the_same_gradients(name, autocast, cuda):
    model, x = build(name).to(cuda).train(), image(cuda)
    results = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        with torch.autocast(cuda.type, torch.bfloat16, enabled=autocast):
            results.append(with_gradients(model, x))
    assert furthest(results[1], results[0]) < 1e-3


@pytest.mark.parametrize("name", ["beit", "convnext"])
def test_a_compiled_encoder_gives_the_same(name, cuda):
    pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    if not shutil.which("gcc") and not shutil.which("cc"):
        pytest.skip("torch.compile needs a C compiler")
    model, x = build(name).to(cuda), image(cuda)
    expected = with_gradients(model, x)
    compiled = torch.compile(model)
    ours = with_gradients(compiled, x)
    assert furthest({n.removeprefix("_orig_mod."): t for n, t in ours.items()}, expected) < 1e-3
