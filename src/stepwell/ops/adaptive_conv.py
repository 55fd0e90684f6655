"""Adaptive convolution: a kernel of its own for every pixel, one for all channels.

The sum of joint bilateral upsampling (FeatUp, arXiv 2403.10516, section 3.2.1; LLaVA-UHD v2, arXiv
2412.13871, equation 2), alone and behind an enlargement, and the products that its kernels are made of.
Letters: B batch, C channels, (h, w) a small map, (H, W) the result, K the kernel's side; offsets in a kernel
go row by row.

The fast twins, on a CPU, are products of tiles (tiles.py). Enlarging and mirroring are folded into the
kernels first: neither map is made.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.ops.choose import choose
from stepwell.ops.derivatives import with_derivatives_of
from stepwell.ops.precision import at_least_single
from stepwell.ops.tiles import Axis, Tiles

__all__ = [
    "adaptive_conv",
    "adaptive_conv_fast",
    "adaptive_conv_reference",
    "adaptive_upsample",
    "adaptive_upsample_fast",
    "adaptive_upsample_reference",
    "neighbour_products",
    "neighbour_products_fast",
    "neighbour_products_reference",
    "reflect",
]


def adaptive_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """x (B, C, H + K - 1, W + K - 1), kernels (B, K*K, H, W) -> (B, C, H, W), in the dtype of `x`.

    Computed in fp32 at least. Raises ValueError for shapes that do not fit.
    """
    side, (height, width) = _side(x, kernels), kernels.shape[2:]
    if x.shape[2:] != (height + side - 1, width + side - 1):
        raise ValueError(
            f"{side}x{side} kernels of {height}x{width} pixels need a map of "
            f"{height + side - 1}x{width + side - 1}, got {x.shape[2]}x{x.shape[3]}"
        )
    exact = at_least_single(x.dtype)
    run = adaptive_conv_fast if _is_fast(x) else adaptive_conv_reference
    return run(x.to(exact), kernels.to(exact)).to(x.dtype)


def adaptive_conv_reference(x: Tensor, kernels: Tensor) -> Tensor:
    """As `adaptive_conv`, both of one dtype."""
    height, width = kernels.shape[2:]
    side = isqrt(kernels.shape[1])
    out = x.new_zeros(*x.shape[:2], height, width)
    for offset in range(side * side):
        row, col = divmod(offset, side)
        out.addcmul_(x[:, :, row : row + height, col : col + width], kernels[:, offset, None])
    return out


def adaptive_conv_fast(x: Tensor, kernels: Tensor) -> Tensor:
    """As `adaptive_conv`, both of one dtype."""
    side = isqrt(kernels.shape[1])
    tiles = _tiles([_identity(length) for length in x.shape[2:]], side)
    out: Tensor = _Sum.apply(x, kernels, tiles)
    return with_derivatives_of(adaptive_conv_reference, (x, kernels), out)


def adaptive_upsample(x: Tensor, kernels: Tensor) -> Tensor:
    """x (B, C, h, w), kernels (B, K*K, H, W), K odd -> (B, C, H, W), in the dtype of `x`.

    The map is enlarged bicubically to the size of the kernels, mirrored at its borders and convolved.
    Computed in fp32 at least. Raises ValueError for shapes that do not fit.
    """
    side = _side(x, kernels)
    if side % 2 == 0:
        raise ValueError(f"kernels must have an odd side, got {side}x{side}")
    exact = at_least_single(x.dtype)  # bicubic weights need fp32
    run = adaptive_upsample_fast if _is_fast(x) else adaptive_upsample_reference
    return run(x.to(exact), kernels.to(exact)).to(x.dtype)


def adaptive_upsample_reference(x: Tensor, kernels: Tensor) -> Tensor:
    """As `adaptive_upsample`, both of one dtype."""
    enlarged = F.interpolate(x, kernels.shape[2:], mode="bicubic", align_corners=False)
    return adaptive_conv_reference(reflect(enlarged, isqrt(kernels.shape[1]) // 2), kernels)


def adaptive_upsample_fast(x: Tensor, kernels: Tensor) -> Tensor:
    """As `adaptive_upsample`, both of one dtype."""
    side = isqrt(kernels.shape[1])
    sizes = zip(x.shape[2:], kernels.shape[2:], strict=True)
    enlargements = [_bicubic(cells, length) for cells, length in sizes]
    tiles = _tiles([_reflected(matrix, side // 2) for matrix in enlargements], side)
    out: Tensor = _Sum.apply(x, kernels, tiles)
    return with_derivatives_of(adaptive_upsample_reference, (x, kernels), out)


def neighbour_products(x: Tensor, radius: int) -> Tensor:
    """x (B, C, H, W) -> (B, K*K, H, W), K = 2 * radius + 1: the product over all channels of every pixel and
    each of its neighbours, mirrored at the borders. Not in half precision, in which softmax loses tails.
    """
    exact = x.to(at_least_single(x.dtype))
    return (neighbour_products_fast if _is_fast(x) else neighbour_products_reference)(exact, radius)


def neighbour_products_reference(x: Tensor, radius: int) -> Tensor:
    """As `neighbour_products`."""
    (height, width), side = x.shape[2:], 2 * radius + 1
    padded = reflect(x, radius)
    shifts = (divmod(offset, side) for offset in range(side * side))
    return torch.stack(
        [(padded[:, :, row : row + height, col : col + width] * x).sum(1) for row, col in shifts], 1
    )


def neighbour_products_fast(x: Tensor, radius: int) -> Tensor:
    """As `neighbour_products`."""
    tiles = _tiles([_reflected(_identity(length), radius) for length in x.shape[2:]], 2 * radius + 1)
    out: Tensor = _Products.apply(x, tiles)
    return with_derivatives_of(lambda x: neighbour_products_reference(x, radius), (x,), out)


def reflect(x: Tensor, radius: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H + 2 * radius, W + 2 * radius), mirrored at the border pixels.

    A side of `radius` pixels or fewer is mirrored again and again, where torch refuses; a single one repeats.
    """
    if min(x.shape[-2:]) > radius:
        return F.pad(x, (radius,) * 4, mode="reflect")
    for axis in (-2, -1):
        x = x.index_select(axis, _mirrored(x.shape[axis], radius).to(x.device))
    return x


def _mirrored(length: int, radius: int) -> Tensor:
    """Where each pixel of a padded side comes from."""
    place = torch.arange(-radius, length + radius, device="cpu")
    if length == 1:
        return torch.zeros_like(place)
    place = place.remainder(2 * length - 2)
    return torch.minimum(place, 2 * length - 2 - place)


def _side(x: Tensor, kernels: Tensor) -> int:
    side = isqrt(kernels.shape[1])
    if side * side != kernels.shape[1]:
        raise ValueError(f"kernels must have a square number of weights, got {kernels.shape[1]}")
    if x.shape[0] != kernels.shape[0]:
        raise ValueError(f"{x.shape[0]} maps, but kernels of {kernels.shape[0]}")
    return side


def _is_fast(x: Tensor) -> bool:
    """Not on the meta device, where costs are counted as they are defined, nor in a compiled graph, where a
    loop over tiles would be unrolled."""
    kind = x.device.type
    why_not = f"adaptive convolution has a fast twin on CPU only, not on {kind}"
    return (
        choose(fast_ok=kind in ("cpu", "meta"), why_not=why_not)
        and kind == "cpu"
        and not torch.compiler.is_compiling()
    )


# ---- the fast twins -------------------------------------------------------------------------------------


def _identity(length: int) -> Tensor:
    return torch.eye(length, dtype=torch.float64, device="cpu")


def _bicubic(cells: int, length: int) -> Tensor:
    """(length, cells): what every pixel of an enlarged line is made of."""
    lines = _identity(cells)[None, :, :, None]
    return F.interpolate(lines, (length, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t()


def _reflected(line: Tensor, radius: int) -> Tensor:
    return line[_mirrored(len(line), radius)]


def _tiles(neighbours: list[Tensor], side: int) -> Tiles:
    return Tiles(*(Axis.of(line, side) for line in neighbours))


class _Sum(torch.autograd.Function):
    """x (B, C, h, w), kernels (B, K*K, H, W) -> (B, C, H, W)."""

    @staticmethod
    def forward(x: Tensor, kernels: Tensor, tiles: Tiles) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return tiles.sum(x, tiles.band(kernels))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, kernels, ctx.tiles = inputs
        ctx.set_materialize_grads(False)
        needs_x, needs_kernels, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_kernels else None, kernels if needs_x else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,), (x, kernels), tiles = grads, ctx.saved_tensors, ctx.tiles
        if grad is None:
            return None, None, None
        with torch.autocast("cpu", enabled=False):
            return (
                None if kernels is None else tiles.spread(grad, tiles.band(kernels)),
                None if x is None else tiles.kernels(tiles.products(x, grad)),
                None,
            )


class _Products(torch.autograd.Function):
    """x (B, C, H, W) -> (B, K*K, H, W)."""

    @staticmethod
    def forward(x: Tensor, tiles: Tiles) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return tiles.kernels(tiles.products(x, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.tiles = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,), (x,), tiles = grads, ctx.saved_tensors, ctx.tiles
        if grad is None:
            return None, None
        with torch.autocast("cpu", enabled=False):
            band = tiles.band(grad)
            return tiles.sum(x, band) + tiles.spread(x, band), None
