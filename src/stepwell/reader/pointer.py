"""Teaching a decoder where to look: one attention head is asked for the cell of the character that comes
next.

Not a paper's part, and not a part of any model: the head's own queries and keys are read while the language
model runs, and a cross-entropy over the visual tokens is added to the loss. Letters: B batch, L sequence, P
pointed positions, N visual tokens of a row, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

__all__ = ["DECODERS", "AttentionTap", "Pointers", "tap_attention"]

DECODERS = ("llama", "mistral", "qwen2")
"""Language models, by transformers' model_type, whose queries and keys are made as `_scores` makes them."""


class Pointers(TypedDict):
    """Where one sample of a batch should look."""

    row: int  # of the batch, where the sample stands
    positions: Tensor  # (P,) positions whose next token is a character of the image
    cells: Tensor  # (P,) index of that character's cell among the row's visual tokens
    visual: Tensor  # (N,) positions of the visual tokens


class AttentionTap:
    """What went into the attention of some layers during one forward pass of one of the DECODERS."""

    def __init__(self) -> None:
        self.seen: list[tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]] = []

    def loss(self, pointers: Sequence[Pointers], *, head: int = 0, power: float = 0.0) -> Tensor | None:
        """Mean cross-entropy of query head `head` over samples and layers, fp32; None where no sample points.
        power: a sample weighs as its number of positions to this.
        """
        pointing = [pointed for pointed in pointers if len(pointed["positions"])]
        if not pointing:
            return None
        losses = [torch.stack([_loss(*seen, pointed, head) for pointed in pointing]) for seen in self.seen]
        means = torch.stack(losses).mean(0)
        weights = torch.tensor([len(pointed["positions"]) ** power for pointed in pointing]).to(means)
        mean: Tensor = (means * weights).sum() / weights.sum()
        return mean


def _loss(
    attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], pointed: Pointers, head: int
) -> Tensor:
    scores = _scores(attention, hidden, rotary, pointed, head)
    return F.cross_entropy(scores.float(), pointed["cells"])


def _scores(
    attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], pointed: Pointers, head: int
) -> Tensor:
    """-> (P, N): scaled products of the head's queries and keys, rotated as the model rotates them."""
    dim, kv_head, row = attention.head_dim, head // attention.num_key_value_groups, pointed["row"]

    def rotated(projection: Any, number: int, positions: Tensor) -> Tensor:
        x = projection(hidden[row, positions])[None, None, :, number * dim : (number + 1) * dim]
        cos, sin = (code[row % len(code), positions][None] for code in rotary)
        turned: Tensor = apply_rotary_pos_emb(x, x, cos, sin)[0]
        return turned[0, 0]

    query = rotated(attention.q_proj, head, pointed["positions"])
    key = rotated(attention.k_proj, kv_head, pointed["visual"])
    scaling: float = attention.scaling
    return query @ key.T * scaling


@contextmanager
def tap_attention(layers: Sequence[Any]) -> Iterator[AttentionTap]:
    """Within the block, every forward pass leaves its layers' attention inputs in the tap."""
    tap = AttentionTap()

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tap.seen.append((module, hidden, kwargs["position_embeddings"]))

    hooks = [layer.self_attn.register_forward_pre_hook(remember, with_kwargs=True) for layer in layers]
    try:
        yield tap
    finally:
        for hook in hooks:
            hook.remove()
