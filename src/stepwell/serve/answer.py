"""Answers to several prompts at once, each as it would be alone, by `generate` of transformers.

Letters: B rows, L tokens so far, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from stepwell.models.engine import Prompts, TransformersEngine
from stepwell.serve.rows import Row

__all__ = ["answer", "end_tokens"]


def end_tokens(engine: TransformersEngine) -> frozenset[int]:
    """Ids that end an answer."""
    end = engine.model.generation_config.eos_token_id
    return frozenset([] if end is None else [end] if isinstance(end, int) else end)


def answer(
    engine: TransformersEngine, prompts: Prompts, rows: Sequence[Row], is_over: Callable[[int], bool]
) -> None:
    """Fills the rows. is_over: asked before every step whether nobody waits for the answer of a row any
    more.
    """
    engine.generate(
        prompts,
        max_new_tokens=max(row.max_new_tokens for row in rows),
        logits_processor=LogitsProcessorList([_Drawn(rows)]),
        stopping_criteria=StoppingCriteriaList([_Watched(rows, is_over)]),
    )


class _Drawn(LogitsProcessor):
    """Where a row draws its tokens, nothing but the drawn one can be chosen."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L), (B, V) -> (B, V)."""
        drawn = {
            i: row.next(scores[i])
            for i, row in enumerate(self.rows)
            if row.temperature > 0 and row.finish is None
        }
        if drawn:
            scores = scores.clone()
            for i, token in drawn.items():
                scores[i] = -torch.inf
                scores[i, token] = 0.0
        return scores


class _Watched(StoppingCriteria):
    """Hands every new token to its row; a row that is done, or that nobody waits for, ends."""

    def __init__(self, rows: Sequence[Row], is_over: Callable[[int], bool]) -> None:
        self.rows, self.is_over = rows, is_over

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B, L) -> (B,)."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish is None:
                row.add(token)
        ended = [row.finish is not None or self.is_over(i) for i, row in enumerate(self.rows)]
        return torch.tensor(ended, device=input_ids.device)
