"""A large fp32 product may be taken as a convolution, with the values and gradients of a linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.layers.linear import Linear
from stepwell.ops import choose, products
from stepwell.ops.choose import prefer

ROWS, WIDTH = 256, 512  # 2**26 products


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the images that were convolved."""
    found: list[torch.Size] = []
    original = F.conv2d

    def spy(image: Tensor, *arguments: object) -> Tensor:
        found.append(image.shape)
        return original(image, *arguments)

    monkeypatch.setattr(F, "conv2d", spy)
    return found


@pytest.fixture
def slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_slow_products", lambda: True)


def inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS, width: int = WIDTH) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, rows // 2, width), torch.randn(width, width), torch.randn(width)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def test_a_large_product_is_a_convolution_where_products_are_slow(slow_products, convolutions):
    x, weight, bias = inputs()
    torch.testing.assert_close(
        products.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight), atol=1e-3, rtol=1e-4)
    assert convolutions == [(1, WIDTH, 1, ROWS)] * 2


def test_it_stays_a_product_where_products_are_fast(monkeypatch, convolutions):
    monkeypatch.setattr(products, "has_slow_products", lambda: False)
    products.linear(*inputs())
    assert not convolutions
    with prefer("fast"):
        products.linear(*inputs())
    assert convolutions


@pytest.mark.parametrize("inside", [lambda: prefer("reference"), lambda: torch.autocast("cpu")])
def test_what_must_stay_a_product(inside, slow_products, convolutions):
    with inside():
        products.linear(*inputs())
    assert not convolutions
    products.linear(*inputs())
    assert convolutions


def test_an_exported_graph_holds_linear_layers(slow_products, convolutions):
    x, layer = inputs()[0], Linear(WIDTH, WIDTH)
    graph = torch.export.export(layer, (x,)).graph
    assert "aten.linear" in str(graph)
    assert "conv" not in str(graph)
    layer(x)
    assert convolutions


@pytest.mark.parametrize(
    "arguments",
    [
        inputs(torch.bfloat16),
        inputs(torch.float64),
        inputs(rows=126, width=1024),  # few rows
        inputs(rows=512, width=128),  # few products
        tuple(tensor.to("meta") for tensor in inputs()),
    ],
)
def test_kinds_and_sizes_that_stay_a_product(arguments, slow_products, convolutions):
    assert products.linear(*arguments).shape == arguments[0].shape
    assert not convolutions


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 3, 5, 4)])
def test_any_shape_of_rows(shape):
    x, weight, bias = torch.randn(shape), torch.randn(3, 4), torch.randn(3)
    torch.testing.assert_close(products.linear_fast(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(0, WIDTH), (2, 0, WIDTH)])
def test_no_rows(shape, slow_products):
    x, weight, bias = torch.zeros(shape), *inputs()[1:]
    assert products.linear(x, weight, bias).shape == shape


def test_rows_of_no_width_are_the_bias(slow_products):
    bias = torch.arange(4.0)
    assert torch.equal(products.linear(torch.zeros(200, 0), torch.zeros(4, 0), bias), bias.expand(200, 4))


def test_rows_that_lie_apart_and_a_turned_weight():
    x, weight = torch.randn(6, 8, dtype=torch.float64)[::2, ::2], torch.randn(4, 3, dtype=torch.float64).T
    torch.testing.assert_close(products.linear_fast(x, weight), F.linear(x, weight))


def test_the_result_lies_as_a_linear_layer_leaves_it():
    assert products.linear_fast(*inputs()).is_contiguous()


def test_first_and_second_derivatives():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(products.linear_fast, (x, weight, bias))
    assert torch.autograd.gradgradcheck(
        lambda *leaves: products.linear_fast(*leaves).square(), (x, weight, bias)
    )


def test_gradients_of_a_large_product(slow_products, convolutions):
    grads = {}
    for function in (products.linear, F.linear):
        leaves = [tensor.requires_grad_() for tensor in inputs()]
        function(*leaves).square().mean().backward()
        grads[function] = [leaf.grad for leaf in leaves]
    assert convolutions
    for ours, theirs in zip(*grads.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_a_place_that_is_no_number_stays_in_its_row():
    x, weight, bias = inputs()
    x[0, 3, 5] = torch.nan
    wrong = products.linear_fast(x, weight, bias).isnan().any(-1).nonzero()
    assert wrong.tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("text", "capability", "slow"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),  # there MKL has kernels of its own for it
    ],
)
def test_whose_products_are_slow(tmp_path, monkeypatch, text, capability, slow):
    report = tmp_path / "cpuinfo"
    report.write_text(text)
    monkeypatch.setattr(choose, "PROCESSOR_REPORT", report)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert choose.has_slow_products.__wrapped__() is slow


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_without_both_libraries_nothing_is_known(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(choose, "PROCESSOR_REPORT", tmp_path / "none")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(choose.platform, "processor", lambda: "AMD64 Family 25, AuthenticAMD")
    assert choose.has_slow_products.__wrapped__()
    monkeypatch.setattr(getattr(torch.backends, missing), "is_available", lambda: False)
    assert not choose.has_slow_products.__wrapped__()
