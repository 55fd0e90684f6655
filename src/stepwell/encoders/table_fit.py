"""Tables and kernels of one geometry for a vision transformer of another; names are ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stepwell.encoders.vit import VisionTransformer
from stepwell.layers.position import resize_patch_kernel, resize_position_embedding, resize_relative_table
from stepwell.structures import Size

__all__ = ["TableFit"]


@dataclass(frozen=True, kw_only=True)
class TableFit:
    """What becomes of patch kernels, position tables and relative tables in an encoder of another geometry.

    source_grid: of the source's tables; None is square. position_grid, class_slot, windows, antialias: the
    encoder's.
    """

    patch: int
    position_grid: Size
    source_grid: Size | None = None
    class_slot: bool = False
    windows: Sequence[int] = ()
    antialias: bool = False

    @classmethod
    def of(cls, encoder: VisionTransformer, source_grid: Size | None) -> TableFit:
        return cls(
            patch=encoder.spec.stride,
            position_grid=encoder.position_grid,
            source_grid=source_grid,
            class_slot=encoder.class_slot,
            windows=encoder.windows,
            antialias=encoder.antialias,
        )

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """name: ours. Relative tables may end in three rows for a class token, which are dropped. What fits
        no grid is returned as it is.
        """
        if name == "patch_embed.proj.weight":
            return resize_patch_kernel(tensor, self.patch)
        if name == "position.table":
            return self._position(tensor)
        if name.endswith(".attn.relative_table"):
            window = self.windows[int(name.split(".")[1])]
            return self._relative(tensor, (window, window) if window else self.position_grid)
        return tensor

    def _position(self, table: Tensor) -> Tensor:
        cells = table.shape[0] - self.class_slot
        side = math.isqrt(cells)
        source = self.source_grid or ((side, side) if side**2 == cells else self.position_grid)
        if math.prod(source) != cells:
            return table
        return resize_position_embedding(
            table, source, self.position_grid, class_slot=self.class_slot, antialias=self.antialias
        )

    def _relative(self, table: Tensor, target: Size) -> Tensor:
        rows = table.shape[0]
        side = (math.isqrt(rows) + 1) // 2
        for source in (self.source_grid, target, (side, side)):
            if source is not None and rows - (2 * source[0] - 1) * (2 * source[1] - 1) in (0, 3):
                return resize_relative_table(
                    table[: (2 * source[0] - 1) * (2 * source[1] - 1)], source, target
                )
        return table
