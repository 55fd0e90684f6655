"""Work on many tokens a part at a time, so that what lies between is never held whole.

Only where no gradient is recorded: a backward pass would keep it anyway. Letters: B batch, N tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MOST", "in_parts"]

MOST = 8192  # tokens of a part: few enough for a cache, enough for matrix products at their full rate


def in_parts(function: Callable[..., Tensor], *tokens: Tensor, most: int = MOST) -> Tensor:
    """function(*tokens) for a function that treats every token by itself.

    tokens: (B, N, ...) each, and so is the result.
    """
    count = tokens[0].shape[1]
    if torch.is_grad_enabled() or count <= most:
        return function(*tokens)
    result: Tensor | None = None
    for start in range(0, count, most):
        part = function(*(x[:, start : start + most] for x in tokens))
        if result is None:
            result = part.new_empty(part.shape[0], count, *part.shape[2:])
        result[:, start : start + most] = part
    assert result is not None
    return result
