"""Ops on a GPU give the values and gradients of their references on a CPU in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_deform_attn import SIZES, make_inputs
from torch import Tensor

from stepwell.layers.attention import attention, attention_reference
from stepwell.layers.position import RelativeBias, relative_position_bias
from stepwell.ops.choose import prefer
from stepwell.ops.deform_attn import deform_attn, deform_attn_reference
from stepwell.ops.depthwise import depthwise
from stepwell.ops.double import double_map
from stepwell.ops.pack import pack, unpack
from stepwell.ops.parts import MOST, in_parts
from stepwell.ops.products import linear
from stepwell.ops.ragged import by_shape
from stepwell.ops.rearrange import map_to_tokens, merge_windows, split_windows, tokens_to_map
from stepwell.ops.resize import resize_map
from stepwell.views.pyramid import image_pyramid

pytestmark = pytest.mark.cuda
Op = Callable[..., Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value


def by_windows(tokens: Tensor, padding: Tensor) -> Tensor:
    windows = split_windows(tokens, (5, 7), 3, padding=padding)
    return merge_windows(windows * torch.linspace(-1, 1, 9).to(tokens)[:, None], (5, 7), 3)


def by_groups(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat(
        [y.flatten() for (y,) in by_shape(lambda x: [x * x.sum((1, 2), keepdim=True)], [a, b, c])]
    )


def packed(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([image.flatten() for image in unpack(pack([a, b]), [(4, 6), (3, 2)])])


def a_pyramid(image: Tensor) -> Tensor:
    return torch.cat([view.flatten() for view in image_pyramid(image, (0.5, 0.75, 1.0))])


def mapped(tokens: Tensor) -> Tensor:
    return map_to_tokens(resize_map(tokens_to_map(tokens, (5, 7)), (9, 6)))


# What runs on the GPU, its definition, and shapes of what goes in.
OPS: dict[str, tuple[Op, Op, list[tuple[int, ...]]]] = {
    "depthwise": (
        depthwise,
        lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=6),
        [(2, 6, 5, 7), (6, 1, 3, 3), (6,)],
    ),
    "double": (
        double_map,
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        [(2, 6, 5, 7), (6, 4, 2, 2), (4,)],
    ),
    "linear": (linear, F.linear, [(2, 300, 48), (96, 48), (96,)]),
    "attention": (attention, attention_reference, [(2, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8)]),
    "attention with bias": (
        attention,
        attention_reference,
        [(2, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8), (3, 20, 30)],
    ),
    "relative bias": (
        lambda table: RelativeBias((3, 4))(table),
        lambda table: relative_position_bias(table, (3, 4)),
        [(5 * 7, 6)],
    ),
    "windows": (by_windows, by_windows, [(2, 35, 4), (4,)]),
    "ragged": (by_groups, by_groups, [(4, 3), (5, 2), (4, 3)]),
    "pack": (packed, packed, [(3, 4, 6), (3, 3, 2)]),
    "pyramid": (a_pyramid, a_pyramid, [(2, 3, 32, 48)]),
    "maps": (mapped, mapped, [(2, 35, 4)]),
}


def with_gradients(op: Op, inputs: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = op(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    gradients = torch.autograd.grad((out * weights.to(out)).sum(), leaves)
    return [out.detach(), *gradients]


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a.cpu().double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_are_those_of_the_definition(name, dtype, path, cuda):
    op, definition, shapes = OPS[name]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    expected = with_gradients(definition, inputs, torch.device("cpu"), torch.float64)
    with prefer(path):
        ours = with_gradients(op, inputs, cuda, dtype)
    assert all(x.device == cuda and x.dtype == dtype for x in ours)
    assert_close(ours, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_deformable_attention_is_that_of_the_reference_in_double(size, dtype, path, cuda):
    value, *points = make_inputs(size, queries=40)
    value = value.to(dtype)  # places and weights come in fp32, as a layer under autocast hands them over

    def run(op, device, kinds):
        leaves = [
            x.to(device, kind).requires_grad_() for x, kind in zip((value, *points), kinds, strict=True)
        ]
        out = op(leaves[0], [size], *leaves[1:])
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weights.to(out)).sum(), leaves)]

    expected = run(deform_attn_reference, "cpu", [torch.float64] * 4)
    with prefer(path):
        ours = run(deform_attn, cuda, [dtype] + [torch.float32] * 3)
    assert ours[0].dtype == dtype
    assert_close(ours, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_place_that_is_no_finite_number_gives_nan_on_a_gpu_too(bad, cuda):
    value, x, y, weights = (t.to(cuda) for t in make_inputs((3, 4)))
    x[0, 2, 1, 3] = bad
    out = deform_attn(value, [(3, 4)], x, y, weights).unflatten(2, (3, 5))
    assert out[0, 2, 1].isnan().all()
    assert out.isnan().sum() == 5


@pytest.mark.parametrize("far", [1e30, -1e30, 3e9, -2.5, 9.5])
def test_points_far_outside_read_nothing_on_a_gpu_too(far, cuda):
    value, x, y, weights = (t.to(cuda) for t in make_inputs((3, 4)))
    x[0, 0], y[0, 1] = far, far
    assert (deform_attn(value, [(3, 4)], x, y, weights)[0, :2] == 0).all()


def test_twins_for_cpus_are_refused_on_a_gpu(cuda):
    value, *points = (t.to(cuda) for t in make_inputs((3, 4)))
    with prefer("fast"), pytest.raises(RuntimeError, match="on CPU only, not on cuda"):
        deform_attn(value, [(3, 4)], *points)
    with prefer("fast"), pytest.raises(RuntimeError, match="on CPU only"):
        double_map(
            torch.ones(1, 2, 2, 2, device=cuda),
            torch.ones(2, 2, 2, 2, device=cuda),
            torch.ones(2, device=cuda),
        )


def test_parts_of_many_tokens_are_those_of_all(cuda):
    tokens, weight = torch.randn(2, MOST, 8, device=cuda), torch.randn(6, 8, device=cuda)
    with torch.no_grad():
        parted = in_parts(lambda x: linear(x, weight), tokens)
    torch.testing.assert_close(parted, F.linear(tokens, weight))
