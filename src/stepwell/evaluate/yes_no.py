"""Yes or no: POPE (arXiv 2305.10355), as LLaVA's evaluator reads answers and counts.

F1 and its parts are counted category by category (random, popular, adversarial), and then averaged. Letters:
K = 5 counts of a question: yes was said and is right, yes was said, yes is right, the answer is right, and 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["MEASURES", "Floats", "pope_counts", "yes_or_no"]

Floats = NDArray[np.float64]

_NO = frozenset({"no", "not"})


def yes_or_no(prediction: str, *, official: bool = False) -> str:
    """The answer that POPE reads: "no" where the first sentence has the word no or not, else "yes"; "" where
    there is no word at all.

    official: the words are No, no and not, between single spaces, and no word at all is a yes.
    """
    sentence = prediction.partition(".")[0].replace(",", "" if official else " ")
    if official:
        return "yes" if {"No", "not", "no"}.isdisjoint(sentence.split(" ")) else "no"
    words = re.findall(r"[^\W_]+", sentence.lower())
    return "" if not words else "yes" if _NO.isdisjoint(words) else "no"


def pope_counts(prediction: str, answer: str, *, official: bool = False) -> tuple[float, ...]:
    """The counts (K,) of one question. Raises ValueError for an answer other than yes and no."""
    right = answer.strip().lower()
    if right not in ("yes", "no"):
        raise ValueError(f"the right answer is yes or no, got {answer!r}")
    said = yes_or_no(prediction, official=official)
    both, said_yes, is_yes = said == right == "yes", said == "yes", right == "yes"
    return tuple(map(float, (both, said_yes, is_yes, said == right, True)))


def _share(part: Floats, whole: Floats) -> Floats:
    """0 of nothing, where the official code divides by zero."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


MEASURES: Mapping[str, Callable[[Floats], Floats]] = {
    "f1": lambda totals: _share(2 * totals[..., 0], totals[..., 1] + totals[..., 2]),
    "accuracy": lambda totals: _share(totals[..., 3], totals[..., 4]),
    "precision": lambda totals: _share(totals[..., 0], totals[..., 1]),
    "recall": lambda totals: _share(totals[..., 0], totals[..., 2]),
    "yes_ratio": lambda totals: _share(totals[..., 1], totals[..., 4]),
}
"""Of counts that were added up (..., K)."""
