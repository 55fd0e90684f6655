"""Work on many tokens a part at a time, so that what lies between is never held whole.

Letters: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepwell.ops.choose import choose

__all__ = ["MOST", "in_parts"]

MOST = 8192
"""Tokens of a part, of the whole batch: few for a cache, enough for matrix products at their full rate."""


def in_parts(
    function: Callable[..., Tensor], *tokens: Tensor, most: int = MOST, recompute: bool = False
) -> Tensor:
    """function(*tokens) for a function that treats every token by itself.

    tokens: (B, N, ...) each, and so is the result. All at once on the reference path and in a compiled graph
    (the loop would be unrolled); and where a gradient is recorded, as the backward pass needs everything
    anyway, unless it is to `recompute` each part.
    """
    batch, count = tokens[0].shape[:2]
    whole = (torch.is_grad_enabled() and not recompute) or torch.compiler.is_compiling() or not choose()
    if whole or batch * count <= most:
        return function(*tokens)
    step = max(1, most // batch)
    parts = zip(*(x.split(step, dim=1) for x in tokens), strict=True)
    if torch.is_grad_enabled():
        again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*part) for part in parts], dim=1)
    first = function(*next(parts))
    result = first.new_empty(batch, count, *first.shape[2:])
    result[:, :step] = first
    for start, part in zip(range(step, count, step), parts, strict=True):
        result[:, start : start + step] = function(*part)
    return result
