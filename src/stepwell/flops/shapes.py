"""What an encoder costs, in closed form. The fields of a shape are the constructor's arguments that matter.

The counting follows PIIP (arXiv 2501.07783); see `Convention` in flops/cost.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any

from stepwell.encoders.catalogue import ENCODERS
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.cost import Convention, Cost, area, conv_cost, linear_cost, norm_cost
from stepwell.structures import Size

__all__ = ["ConvNextShape", "Shape", "VitShape", "shape_of"]


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """A plain vision transformer (encoders/vit.py)."""

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch: int = 16
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    norm: str = "layernorm"
    layer_scale: float | None = None
    windows: int | tuple[int, ...] = 0
    window_padding: str = "tokens"
    position: str = "table"
    position_grid: Size = (14, 14)
    temporal_rows: int = 0
    class_token: bool = False
    class_slot: bool = False
    embed_norm: bool = False

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Width after every layer."""
        return (self.dim,) * self.depth

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell after every layer."""
        return (self.patch,) * self.depth

    def cost(self, size: Size, convention: Convention) -> Cost:
        """Stem and all layers on a view of `size` pixels."""
        grid = (size[0] // self.patch, size[1] // self.patch)
        total = conv_cost(area(grid), 3, self.dim, self.patch, bias=self.patch_bias)
        rows = self.temporal_rows + self.class_token
        if self.position == "table":
            rows += area(self.position_grid) + self.class_slot
        total += Cost(0, rows * self.dim)
        if self.embed_norm:
            total += self._norm(area(grid) + self.class_token, convention)
        windows = (self.windows,) * self.depth if isinstance(self.windows, int) else self.windows
        for window in set(windows):
            total += self._layer(grid, window, convention) * windows.count(window)
        return total

    def _layer(self, grid: Size, window: int, convention: Convention) -> Cost:
        cells, dim, hidden = area(grid), self.dim, int(self.dim * self.mlp_ratio)
        tokens = projected = cells + self.class_token
        if window and self.window_padding == "tokens":
            projected = -(-grid[0] // window) * -(-grid[1] // window) * window**2
        scales = Cost(0, 0 if self.layer_scale is None else 2 * dim)
        qk_norms = Cost(0, 2 * dim * self.qk_norm)
        if self.position == "relative":
            rows, cols = (window, window) if window else self.position_grid
            qk_norms += Cost(0, (2 * rows - 1) * (2 * cols - 1) * self.num_heads)
        return (
            self._norm(tokens, convention) * 2
            + linear_cost(projected, dim, 3 * dim, bias=self.qkv_bias)
            + Cost(2 * cells * (window**2 if window else cells) * dim)
            + linear_cost(tokens, dim, dim)
            + linear_cost(tokens, dim, hidden)
            + linear_cost(tokens, hidden, dim)
            + scales
            + qk_norms
        )

    def _norm(self, tokens: int, convention: Convention) -> Cost:
        if self.norm == "rmsnorm":
            return norm_cost(tokens, self.dim, per_element=convention.rms_norm, bias=False)
        return norm_cost(tokens, self.dim)


@dataclass(frozen=True, kw_only=True)
class ConvNextShape:
    """A ConvNeXt (encoders/convnext.py), whose downsampling layers are entries of their own."""

    dims_of_stages: tuple[int, ...]
    depths: tuple[int, ...]
    stage_strides: tuple[int, ...] = (4, 2, 2, 2)
    stem_kernel: int = 4
    kernel_size: int = 7
    mlp_ratio: float = 4.0
    layer_scale: float | None = 1e-6

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Width after every layer."""
        return self._per_layer(self.dims_of_stages)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell after every layer."""
        return self._per_layer(tuple(accumulate(self.stage_strides, mul)))

    def _per_layer(self, values: tuple[int, ...]) -> tuple[int, ...]:
        lengths = [depth + (stage > 0) for stage, depth in enumerate(self.depths)]
        return tuple(value for value, length in zip(values, lengths, strict=True) for _ in range(length))

    def cost(self, size: Size, convention: Convention) -> Cost:
        """Stem and all layers on a view of `size` pixels."""
        total, before, stride = Cost(), 3, 1
        for stage, (dim, depth) in enumerate(zip(self.dims_of_stages, self.depths, strict=True)):
            stride *= self.stage_strides[stage]
            cells = (size[0] // stride) * (size[1] // stride)
            kernel = self.stage_strides[stage] if stage else self.stem_kernel
            total += conv_cost(cells, before, dim, kernel) + norm_cost(0, before if stage else dim)
            total += self._block(cells, dim) * depth
            before = dim
        return total

    def _block(self, cells: int, dim: int) -> Cost:
        hidden = int(dim * self.mlp_ratio)
        return (
            conv_cost(cells, dim, dim, self.kernel_size, groups=dim)
            + norm_cost(0, dim)
            + linear_cost(cells, dim, hidden)
            + linear_cost(cells, hidden, dim)
            + Cost(0, 0 if self.layer_scale is None else dim)
        )


Shape = VitShape | ConvNextShape


def shape_of(encoder: str, arguments: Mapping[str, Any] | None = None) -> Shape:
    """The shape of an encoder of the catalogue, with the constructor arguments that differ.

    Raises ValueError for an encoder that the catalogue does not have.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"unknown encoder {encoder!r}; choose from {', '.join(sorted(ENCODERS))}")
    entry = ENCODERS[encoder]
    merged: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in {**entry.arguments, **(arguments or {})}.items()
    }
    if entry.build is VisionTransformer:
        known = {field.name for field in fields(VitShape)}
        return VitShape(**{name: value for name, value in merged.items() if name in known})
    merged["dims_of_stages"] = merged.pop("dims")
    merged["stage_strides"] = merged.pop("strides", (4, 2, 2, 2))
    known = {field.name for field in fields(ConvNextShape)}
    return ConvNextShape(**{name: value for name, value in merged.items() if name in known})
