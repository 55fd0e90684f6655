"""The matrices of hierarchical window attention: all of it that no image changes.

LLaVA-UHD v2, arXiv 2412.13871, section 3.2. Letters: B views, C width of a level, D the language model's
width, n queries of a view, each with its window, k bins of a window on a level, K on all levels, s sets of
queries, h heads of width d = D / h, z codes that keys may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell.ops.one_query import one_query_fast
from stepwell.ops.parts import in_parts
from stepwell.ops.pooled_norm import Deviation
from stepwell.ops.products import linear

__all__ = ["WindowMatrices"]

MOST = 2**21
"""Elements of the queries of some windows, in the width of a cell: 8 MB in fp32."""


class WindowMatrices(NamedTuple):
    """Pooled cells are projected, and then read; or, folded, read as they are by keys' and values' matrices
    that have the projections in them, which takes long once and spares much with every call.

    Folded, `queries`, `keys` and `value` are 2 D sum(C + 2) + n s D numbers in the dtype of products, and
    `deviations` and `codes` sum(C^2 + C + 1) + n s h z in fp32: 135 MB for three levels of width 1024 in
    front of Vicuna-7B, and 75 MB with products in bf16.
    """

    deviations: list[Deviation]  # of every level
    projections: list[Tensor]  # (D, C + 2) of every level, or none where they are folded
    queries: Tensor  # (n, s, h, d), scaled
    codes: Tensor  # (n, s, h, z): products of queries with the keys of codes
    keys: list[Tensor]  # (h, d, D), or folded (h, d, C + 2) of every level
    value: Tensor  # (h, D, d), or folded (h, sum(C + 2), d)
    bias: Tensor  # (h, d), of values

    def projected(self, levels: Iterable[tuple[Deviation, Tensor]]) -> WindowMatrices:
        """levels: of each, the deviation and the matrix that pooled cells are projected by."""
        dtype = self.queries.dtype
        deviations, matrices = zip(*levels, strict=True)
        return self._replace(
            deviations=list(deviations),
            projections=[matrix.to(dtype) for matrix in matrices],
            keys=[key.to(dtype) for key in self.keys],
            value=self.value.to(dtype),
        )

    def folded(self, levels: Iterable[tuple[Deviation, Tensor]], dims: Sequence[int]) -> WindowMatrices:
        """The same for levels of widths `dims`, multiplied out in fp32 at least, and then rounded. One level
        after the other: all that is not kept is never held at once.
        """
        heads, _, dim = self.value.shape
        value = self.queries.new_empty(heads, sum(dims) + 2 * len(dims), dim)
        deviations, keys = [], []
        for (deviation, matrix), part in zip(
            levels, value.split([width + 2 for width in dims], 1), strict=True
        ):
            of_key, of_value = (w.to(matrix.dtype) for w in (self.keys[0], self.value.transpose(1, 2)))
            deviations.append(deviation)
            keys.append((of_key @ matrix).to(value.dtype))
            part.copy_((of_value @ matrix).transpose(1, 2))
        return self._replace(deviations=deviations, keys=keys, value=value)

    def read(self, cells: Sequence[Tensor], codes: Tensor) -> Tensor:
        """Pooled cells of every level (B, n, k, C + 2), codes (n, s, h, K), which are added to the products
        of queries and keys -> (B, n, s, h, d). Some windows at a time, in training too.
        """
        # In training each part adds a gradient to the matrices, which is not to be more than its own work.
        most = max(MOST, self.keys[0].numel()) if torch.is_grad_enabled() else MOST
        windows = max(1, most // (self.queries[0, ..., 0].numel() * self.keys[0].shape[2]))
        cells = [level.to(self.queries.dtype) for level in cells]
        tokens = (*cells, self.queries[None], codes[None])
        return in_parts(self._read, *tokens, most=windows * len(cells[0]), recompute=True)

    def _read(self, *windows: Tensor) -> Tensor:
        *cells, queries, codes = windows
        if self.projections:
            pairs = zip(cells, self.projections, strict=True)
            cells = [torch.cat([linear(level, matrix) for level, matrix in pairs], 2)]
        return one_query_fast(queries[0], codes[0], cells, self.keys, self.value, self.bias)
