"""Work on many tokens a part at a time, so that what lies between is never held whole.

Letters: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepwell.ops.choose import choose

__all__ = ["MOST", "in_parts"]

MOST = 8192
"""Tokens of a part, of the whole batch: few for a cache, enough for matrix products at their full rate."""


def in_parts(function: Callable[..., Tensor], *tokens: Tensor, most: int = MOST) -> Tensor:
    """function(*tokens) for a function that treats every token by itself.

    tokens: (B, N, ...) each, and so is the result. All at once on the reference path, where a gradient is
    recorded (the backward pass needs everything anyway) and in a compiled graph (the loop would be unrolled).
    """
    batch, count = tokens[0].shape[:2]
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or not choose()
    if whole or batch * count <= most:
        return function(*tokens)
    step = max(1, most // batch)
    parts = zip(*(x.split(step, dim=1) for x in tokens), strict=True)
    first = function(*next(parts))
    result = first.new_empty(batch, count, *first.shape[2:])
    result[:, :step] = first
    for start, part in zip(range(step, count, step), parts, strict=True):
        result[:, start : start + step] = function(*part)
    return result
