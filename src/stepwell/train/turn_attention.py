"""Attention of turns apart and packed samples on a processor: no product of what may not look at one another.

Of a page with many questions most pairs are masked out: visual tokens look back, and a turn looks at visual
tokens and at itself. Queries are taken in blocks, and a block meets only those keys that any of its rows may
look at. Letters: B batch, H heads, L length, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import MODEL_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["TURNS_APART", "attend_in_blocks", "check_decoder"]

TURNS_APART = "stepwell_turns_apart"
"""The name of this attention among transformers' own."""
_ROWS = 512  # queries of a block
_SLIDING = "sliding_attention"


class _Block(NamedTuple):
    rows: slice
    seen: Tensor  # (K,) the keys that any of the rows may look at
    mask: Tensor  # (B, 1, rows, K)


_blocks: MutableMapping[Tensor, list[_Block]] = WeakTensorKeyDictionary()
"""Of each mask as long as it lives: all layers of a model are given the same."""


def attend_in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """query (B, H, L, D), key and value with as many heads or fewer, attention_mask (B, 1, L, L), True where
    a query may look, and transformers' other arguments -> (B, L, H, D), as its "sdpa" gives it.

    The reference is that one; it also serves other devices, whose kernels are quick enough, and other masks.
    """
    is_biased = arguments.get("position_bias") is not None
    if attention_mask is None or is_biased or not _is_of_turns(attention_mask, query, key):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **arguments
        )
        return found
    if attention_mask not in _blocks:
        _blocks[attention_mask] = _blocks_of(attention_mask)
    outputs = [
        sdpa_attention_forward(
            module,
            query[:, :, block.rows],
            key.index_select(2, block.seen),
            value.index_select(2, block.seen),
            block.mask,
            **arguments,
        )[0]
        for block in _blocks[attention_mask]
    ]
    return torch.cat(outputs, dim=1), None


def _is_of_turns(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    pairs = (1, query.shape[2], key.shape[2])
    return mask.dtype == torch.bool and mask.shape[1:] == pairs and query.device.type == "cpu"


def _blocks_of(mask: Tensor) -> list[_Block]:
    blocks = []
    for start in range(0, mask.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        seen = mask[:, 0, rows].any(dim=1).any(dim=0).nonzero()[:, 0]
        blocks.append(_Block(rows, seen, mask[:, :, rows].index_select(3, seen)))
    return blocks


def check_decoder(text: Any, length: int) -> None:
    """Raises ValueError for a language model, by its configuration, that in samples of up to so many tokens
    would not heed who may look where: one that mixes tokens otherwise than by attention, or takes no
    positions, or whose window is shorter, for a mask of all pairs would take its place.
    """
    kinds = set(getattr(text, "layer_types", None) or [_SLIDING])
    window = getattr(text, "sliding_window", None)
    if other := sorted(kinds - {"full_attention", _SLIDING}):
        why = f"has layers of {other[0]}"
    elif _SLIDING in kinds and window is not None and window < length:
        why = f"has a window of {window} tokens; max_length is {length}"
    elif "position_ids" not in inspect.signature(MODEL_MAPPING[type(text)].forward).parameters:
        why = "takes no position_ids"
    else:
        return
    raise ValueError(
        f"turns apart and packed samples need attention in which none sees another; {text.model_type} {why}"
    )


AttentionInterface.register(TURNS_APART, attend_in_blocks)
