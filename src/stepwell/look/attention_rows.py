"""Who looks at whom in any attention: what goes into torch's `scaled_dot_product_attention` is seen while a
network runs, and rows of the softmax are worked out again of its queries and keys.

Nothing of a network is copied or changed, so that encoders of ours and of timm, and language models of ours
and of transformers, are looked into alike. Letters: B batch, h heads, N queries, M keys, d width of a head, R
chosen rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepwell.ops.precision import at_least_single

__all__ = ["Attended", "SeeAttention"]


class Attended(NamedTuple):
    """What one call was given."""

    query: Tensor  # (B, h, N, d)
    key: Tensor  # (B, h or fewer, M, d)
    mask: Tensor | None = None  # broadcasts to (B, h, N, M): True or 0 where a query may look
    is_causal: bool = False
    scale: float | None = None  # None is d ** -0.5

    def rows(self, positions: Sequence[int] | Tensor) -> Tensor:
        """(B, h, R, M): how much the queries at these positions take of every key; a row sums to 1."""
        exact = at_least_single(self.query.dtype)
        chosen = torch.as_tensor(positions, device=self.query.device)
        query, key = self.query[:, :, chosen].to(exact), self.key.to(exact)
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = query @ key.transpose(-2, -1) * scale
        if self.is_causal:
            seen = torch.arange(key.shape[2], device=chosen.device) <= chosen[:, None]
            scores = scores.masked_fill(~seen, -torch.inf)
        if self.mask is not None:
            count = self.query.shape[2]
            mask = self.mask.expand(*self.mask.shape[:-2], count, key.shape[2])[..., chosen, :]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = scores + mask.to(exact)
        return scores.softmax(-1)


class SeeAttention(TorchFunctionMode):
    """Within the block, `see` is called for every attention that is computed, before it is."""

    def __init__(self, see: Callable[[Attended], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.see(_attended(*args, **kwargs))
        return func(*args, **kwargs)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """Arguments as torch names them."""
    return Attended(query, key, attn_mask, is_causal, scale)
