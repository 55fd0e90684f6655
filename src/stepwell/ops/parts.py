"""Work on many tokens a part at a time, so that what lies between is never held whole.

On the fast path, where no gradient is recorded: a backward pass would keep it anyway. A compiled graph has
all at once, since a loop would be unrolled. Letters: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepwell.ops.choose import choose

__all__ = ["MOST", "in_parts"]

MOST = 8192
"""Tokens of a part, all pictures together: few for a cache, enough for matrix products at their full rate."""


def in_parts(function: Callable[..., Tensor], *tokens: Tensor, most: int = MOST) -> Tensor:
    """function(*tokens) for a function that treats every token by itself.

    tokens: (B, N, ...) each, and so is the result.
    """
    batch, count = tokens[0].shape[:2]
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or batch * count <= most or not choose(fast_ok=True, why_not=""):
        return function(*tokens)
    step = max(1, most // batch)
    result: Tensor | None = None
    for start in range(0, count, step):
        part = function(*(x[:, start : start + step] for x in tokens))
        if result is None:
            result = part.new_empty(part.shape[0], count, *part.shape[2:])
        result[:, start : start + step] = part
    assert result is not None
    return result
