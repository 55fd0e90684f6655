"""Adaptive convolution, alone and behind an enlargement, and products of neighbours: both paths against
F.unfold, F.interpolate and F.pad."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.ops import adaptive_conv as module
from stepwell.ops.adaptive_conv import adaptive_conv, adaptive_upsample, neighbour_products, reflect
from stepwell.ops.choose import prefer

PATHS = pytest.mark.parametrize("path", ["reference", "fast"])
SIZES = pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (9, 1), (8, 16), (11, 13), (17, 5)])
KERNELS = pytest.mark.parametrize("side", [1, 3, 7])


def mirrored(x: Tensor, radius: int) -> Tensor:
    """One pixel at a time by F.pad where it can, from a map that repeats, a single pixel repeated."""
    for axis in (2, 3):
        line = x.movedim(axis, -1)
        length = line.shape[-1]
        period = torch.cat([line, line[..., 1:-1].flip(-1)], -1) if length > 1 else line
        places = [place % period.shape[-1] for place in range(-radius, length + radius)]
        x = period[..., places].movedim(-1, axis)
    return x


def unfolded(padded: Tensor, kernels: Tensor) -> Tensor:
    side = math.isqrt(kernels.shape[1])
    neighbours = F.unfold(padded, side).unflatten(1, (padded.shape[1], side * side))
    return torch.einsum("bcop,bop->bcp", neighbours, kernels.flatten(2)).unflatten(2, kernels.shape[2:])


def enlarged(x: Tensor, kernels: Tensor) -> Tensor:
    large = F.interpolate(x, kernels.shape[2:], mode="bicubic", align_corners=False)
    return unfolded(mirrored(large, math.isqrt(kernels.shape[1]) // 2), kernels)


def products(x: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    neighbours = F.unfold(mirrored(x, radius), side).unflatten(1, (x.shape[1], side * side))
    return torch.einsum("bcop,bcp->bop", neighbours, x.flatten(2)).unflatten(2, x.shape[2:])


def inputs(size, side, *, batch=2, dim=5, padded=True, dtype=torch.float64) -> list[Tensor]:
    """A map, padded already or to be enlarged twice, and kernels."""
    torch.manual_seed(0)
    scale, margin = (1, side - 1) if padded else (2, 0)
    x = torch.randn(batch, dim, size[0] + margin, size[1] + margin, dtype=dtype)
    return [x, torch.randn(batch, side * side, scale * size[0], scale * size[1], dtype=dtype)]


def check(run, expected, tensors: list[Tensor]) -> None:
    """Values, and gradients of everything that goes in."""
    results = []
    for function in (run, expected):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad(out, leaves, weights)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@PATHS
@SIZES
@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_adaptive_convolution_is_unfold_and_einsum(path, size, side):
    with prefer(path):
        check(adaptive_conv, unfolded, inputs(size, side))


@PATHS
@SIZES
@KERNELS
def test_upsampling_is_interpolate_and_pad_and_einsum(path, size, side):
    with prefer(path):
        check(adaptive_upsample, enlarged, inputs(size, side, padded=False))


@PATHS
@pytest.mark.parametrize("large", [(5, 7), (15, 10), (9, 23), (3, 4)])
def test_upsampling_reaches_any_size(path, large):
    x, _ = inputs((5, 7), 3, padded=False)
    with prefer(path):
        check(adaptive_upsample, enlarged, [x, torch.randn(2, 9, *large, dtype=x.dtype)])


@PATHS
@SIZES
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_products_of_neighbours_are_unfold_and_einsum(path, size, radius):
    (x, _) = inputs(size, 1)
    with prefer(path):
        check(lambda x: neighbour_products(x, radius), lambda x: products(x, radius), [x])


@PATHS
@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
def test_first_and_second_derivatives_are_numeric_ones(path, run):
    tensors = inputs((3, 2), 3, batch=1, dim=2, padded=run is adaptive_conv)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with prefer(path):
        assert gradcheck(run, leaves)
        assert gradgradcheck(run, leaves)


@PATHS
def test_first_and_second_derivatives_of_products_are_numeric_ones(path):
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    with prefer(path):
        assert gradcheck(lambda x: neighbour_products(x, 1), x)
        assert gradgradcheck(lambda x: neighbour_products(x, 1), x)


@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_costs_none(run, frozen, monkeypatch):
    def never(*args):
        raise AssertionError("a gradient that nobody asked for")

    monkeypatch.setattr(module.Tiles, "spread" if frozen == 0 else "products", never)
    tensors = inputs((5, 7), 3, padded=run is adaptive_conv)
    tensors[1 - frozen].requires_grad_()
    with prefer("fast"):
        run(*tensors).sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad.abs().min() > 0


@PATHS
@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
def test_strided_and_channels_last_tensors_give_what_contiguous_ones_give(run, path):
    x, kernels = inputs((9, 10), 3, padded=run is adaptive_conv)
    with prefer(path):
        expected = run(x, kernels)
        for strided in (
            lambda t: t.to(memory_format=torch.channels_last),
            lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
            lambda t: torch.stack([t, t], -1)[..., 1],
        ):
            torch.testing.assert_close(run(strided(x), strided(kernels)), expected)


@PATHS
@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full_and_rounded_once(run, path, dtype):
    x, kernels = inputs((9, 10), 7, padded=run is adaptive_conv, dtype=torch.float32)
    x = x.to(dtype)
    with prefer(path):
        out, exact = run(x, kernels), run(x.float(), kernels)
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))


@PATHS
def test_products_of_half_precision_are_single(path):
    x = torch.randn(1, 8, 5, 6).bfloat16()
    with prefer(path):
        out = neighbour_products(x, 1)
        torch.testing.assert_close(out, neighbour_products(x.float(), 1), rtol=0, atol=0)
    assert out.dtype == torch.float32


@PATHS
@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
def test_autocast_does_not_round_what_is_summed(run, path):
    tensors = [
        t.requires_grad_() for t in inputs((9, 10), 7, padded=run is adaptive_conv, dtype=torch.float32)
    ]
    results = []
    for enabled in (False, True):
        with prefer(path), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = run(*tensors)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for cast, exact in zip(*results, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, exact)


@PATHS
def test_autocast_does_not_round_products(path):
    x, results = torch.randn(1, 8, 9, 10, requires_grad=True), []
    for enabled in (False, True):
        with prefer(path), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = neighbour_products(x, 1)
            results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
def test_an_image_of_a_batch_is_what_it_is_alone(run):
    x, kernels = inputs((9, 21), 7, batch=3, padded=run is adaptive_conv, dtype=torch.float32)
    with prefer("fast"):
        batch = run(x, kernels)
        single = torch.cat([run(x[i : i + 1], kernels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(batch, single, rtol=1e-6, atol=1e-6)


@PATHS
def test_no_images_give_nothing_and_gradients_of_zero(path):
    for run in (adaptive_conv, adaptive_upsample):
        tensors = [t.requires_grad_() for t in inputs((5, 6), 3, batch=0, padded=run is adaptive_conv)]
        with prefer(path):
            out = run(*tensors)
            assert out.shape == (0, 5, *tensors[1].shape[2:])
            assert all(
                g.shape == t.shape
                for g, t in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True)
            )
            assert neighbour_products(tensors[0], 1).shape == (0, 9, *tensors[0].shape[2:])


@PATHS
@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
def test_tensors_without_memory_have_the_shape_of_the_result(run, path):
    x, kernels = inputs((5, 6), 3, padded=run is adaptive_conv)
    with prefer(path), torch.device("meta"):
        assert run(x.to("meta"), kernels.to("meta")).shape == (2, 5, *kernels.shape[2:])
        assert neighbour_products(x.to("meta"), 2).shape == (2, 25, *x.shape[2:])


@pytest.mark.parametrize("run", [adaptive_conv, adaptive_upsample])
def test_compiles_without_graph_breaks_forward_and_backward(run):
    tensors = [t.requires_grad_() for t in inputs((5, 6), 3, padded=run is adaptive_conv)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*tensors), run(*tensors)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
    )


@PATHS
def test_tables_are_made_where_the_map_is_whatever_the_default_device(path):
    tensors = inputs((2, 9), 7, padded=False)
    with prefer(path), torch.device("meta"):
        outs = [adaptive_upsample(*tensors), neighbour_products(tensors[0], 3)]
    torch.testing.assert_close(outs, [enlarged(*tensors), products(tensors[0], 3)])


@pytest.mark.parametrize("size", [(8, 16), (11, 13)])
def test_a_map_comes_out_pixel_by_pixel_without_a_gap(size):
    with prefer("fast"):
        out = adaptive_conv(*inputs(size, 3))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_graph_holds_the_reference(monkeypatch):
    """Or it would hold every tile."""
    monkeypatch.setattr(module, "Tiles", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with prefer("fast"):
        check(adaptive_conv, unfolded, inputs((5, 7), 3))
        check(adaptive_upsample, enlarged, inputs((5, 7), 3, padded=False))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.count = max(self.count, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_nothing_larger_than_the_map_is_made():
    x, kernels = inputs((40, 40), 7, batch=1, dim=256, dtype=torch.float32)
    with prefer("fast"), torch.no_grad(), Largest() as largest:
        adaptive_conv(x, kernels)
    assert largest.count == x.numel()
    x, kernels = inputs((24, 24), 7, batch=1, dim=256, padded=False, dtype=torch.float32)
    with prefer("fast"), torch.no_grad(), Largest() as largest:
        assert adaptive_upsample(x, kernels).numel() == largest.count


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("radius", [0, 1, 3, 4])
def test_reflection_is_that_of_torch_and_goes_on_where_torch_refuses(length, radius):
    x = torch.randn(2, 3, length, 6)
    torch.testing.assert_close(reflect(x, radius), mirrored(x, radius))
    if radius < length:
        assert torch.equal(reflect(x, radius), F.pad(x, (radius,) * 4, mode="reflect"))


def test_small_maps_are_mirrored_again_and_again():
    line = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    assert reflect(line, 3)[0, 0, 0].tolist() == [2, 3, 2, 1, 2, 3, 2, 1, 2]
    assert reflect(line, 3)[0, 0, :, 3].tolist() == [1] * 7


@pytest.mark.parametrize(
    ("run", "x", "kernels", "words"),
    [
        (adaptive_conv, (1, 2, 6, 6), (1, 8, 4, 4), "square number of weights, got 8"),
        (adaptive_conv, (1, 2, 6, 7), (1, 9, 4, 4), "3x3 kernels of 4x4 pixels need a map of 6x6, got 6x7"),
        (adaptive_conv, (2, 2, 6, 6), (1, 9, 4, 4), "2 maps, but kernels of 1"),
        (adaptive_upsample, (2, 2, 2, 2), (1, 9, 4, 4), "2 maps, but kernels of 1"),
        (adaptive_upsample, (1, 2, 2, 2), (1, 4, 4, 4), "an odd side, got 2x2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(run, x, kernels, words):
    with pytest.raises(ValueError, match=words):
        run(torch.zeros(x), torch.zeros(kernels))


def test_a_wish_for_the_fast_twin_on_another_device_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    assert not module._is_fast(Elsewhere())
    with prefer("fast"), pytest.raises(RuntimeError, match="on CPU only, not on cuda"):
        module._is_fast(Elsewhere())
