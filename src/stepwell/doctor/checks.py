"""Whether the fast paths give here what their references give: each op on a small input of odd size, its
values and the gradients of all that goes in.

The tests of this package hold the same on many inputs, elsewhere: a processor, a library or a GPU of this
machine may do otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.folders import one_line
from stepwell.layers.attention import attention
from stepwell.ops.adaptive_conv import adaptive_conv, adaptive_upsample, neighbour_products
from stepwell.ops.choose import Path, prefer
from stepwell.ops.deform_attn import deform_attn
from stepwell.ops.depthwise import depthwise
from stepwell.ops.double import double_map
from stepwell.ops.one_query import one_query_fast, one_query_reference
from stepwell.ops.parts import in_parts
from stepwell.ops.planes import planes_to_learn_from
from stepwell.ops.pooled_norm import norm_of_pooled, pool_for_norm
from stepwell.ops.products import linear
from stepwell.ops.window_pool import window_pool

__all__ = ["CHECKS", "MOST", "Check", "Result", "self_check"]

MOST = 1e-3
"""The largest difference that is rounding, by the largest value: products of GPUs round after ten bits."""

Run = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Check:
    """An op and the shapes of what goes in, normal numbers; the op is told which path, and mostly `prefer`
    has said it already.
    """

    run: Callable[[Path, list[Tensor]], Tensor]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """Of one op on one device. difference: the largest, of values and gradients, by the largest value; None
    where an error came before, which `error` tells.
    """

    name: str
    device: str
    difference: float | None
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.difference is not None and self.difference <= MOST


def _of(function: Run) -> Callable[[Path, list[Tensor]], Tensor]:
    return lambda path, tensors: function(*tensors)


def _deform_attn(value: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return deform_attn(value, [(5, 7), (3, 4)], 3 * x + 2, 2 * y + 2, weights)  # some points are outside


def _in_parts(path: Path, tensors: list[Tensor]) -> Tensor:
    """Values alone: where a gradient is recorded, it does not part anything unless told to."""
    with torch.no_grad():
        return in_parts(torch.sigmoid, *tensors, most=5)


def _one_query(path: Path, tensors: list[Tensor]) -> Tensor:
    queries, codes, fine, coarse, fine_key, coarse_key, value, bias = tensors
    run = one_query_reference if path == "reference" else one_query_fast
    return run(queries, codes, [fine, coarse], [fine_key, coarse_key], value, bias)


def _pooled_norm(path: Path, tensors: list[Tensor]) -> Tensor:
    """Projected, normed and pooled, or pooled first."""
    x, weight, bias, gain, shift = tensors
    grid, bins, eps = (2, 3), (2, 1), 1e-5
    if path == "reference":
        normed = F.layer_norm(F.linear(x.movedim(1, -1), weight, bias), (len(weight),), gain, shift, eps)
        return window_pool(normed.movedim(-1, 1), grid, bins)
    deviation, matrix = norm_of_pooled(weight, bias, gain, shift, eps=eps)
    return pool_for_norm(x, deviation, grid, bins, edges=x.dtype) @ matrix.t()


def _planes(x: Tensor, weight: Tensor) -> Tensor:
    x = x.to(memory_format=torch.channels_last)
    return F.conv2d(planes_to_learn_from(x, weight), weight, padding=1)


CHECKS: Mapping[str, Check] = {
    "adaptive_conv": Check(_of(adaptive_conv), ((2, 5, 13, 15), (2, 9, 11, 13))),
    "adaptive_upsample": Check(_of(adaptive_upsample), ((2, 5, 7, 9), (2, 9, 14, 18))),
    "attention": Check(_of(attention), ((2, 3, 7, 5), (2, 3, 11, 5), (2, 3, 11, 5), (3, 7, 11))),
    "deform_attn": Check(_of(_deform_attn), ((2, 47, 3, 5), (2, 9, 3, 6), (2, 9, 3, 6), (2, 9, 3, 6))),
    "depthwise": Check(_of(depthwise), ((2, 5, 9, 7), (5, 1, 3, 3), (5,))),
    "double_map": Check(_of(double_map), ((2, 5, 9, 7), (5, 3, 2, 2), (3,))),
    "in_parts": Check(_in_parts, ((2, 17, 3),)),
    "linear": Check(_of(linear), ((1, 131, 521), (509, 521), (509,))),
    "neighbour_products": Check(_of(partial(neighbour_products, radius=1)), ((2, 5, 11, 13),)),
    "one_query": Check(
        _one_query,
        (
            *((6, 1, 2, 3), (6, 1, 2, 5)),  # queries and codes, of 6 windows
            *((2, 6, 4, 7), (2, 6, 1, 5)),  # cells of two levels
            *((2, 3, 7), (2, 3, 5), (2, 12, 3), (2, 3)),  # matrices of keys, that of values, its bias
        ),
    ),
    "planes": Check(_of(_planes), ((2, 5, 9, 7), (3, 5, 3, 3))),
    "pooled_norm": Check(_pooled_norm, ((2, 5, 9, 7), (11, 5), (11,), (11,), (11,))),
}
"""By the op's name."""


def self_check(device: str = "cpu") -> list[Result]:
    """Every check on a device, in fp32. What goes wrong in one is its result's error, and never raised."""
    return [_result(name, check, device) for name, check in CHECKS.items()]


def _result(name: str, check: Check, device: str) -> Result:
    try:
        reference, fast = (_values(name, check, path, device) for path in _paths(device))
        return Result(name, device, max(map(_difference, fast, reference)))
    except Exception as error:  # whatever is wrong here is what is to be told
        return Result(name, device, None, f"{type(error).__name__}: {one_line(error)}")


def _paths(device: str) -> tuple[Path, Path]:
    """Elsewhere than on a CPU most ops have no fast twin, and "fast" would be an error."""
    return "reference", "fast" if torch.device(device).type == "cpu" else "auto"


def _values(name: str, check: Check, path: Path, device: str) -> list[Tensor]:
    """The result, and the gradients where it has them, of the same numbers in every run."""
    numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensors = [torch.randn(shape, generator=numbers).to(device).requires_grad_() for shape in check.shapes]
    with prefer(path), torch.enable_grad():
        out = check.run(path, tensors)
    if not out.requires_grad:
        return [out]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights)]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, by the largest value. Raises ValueError where one of ours is no number."""
    if not bool(ours.isfinite().all()):
        raise ValueError("some values are no finite numbers")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
