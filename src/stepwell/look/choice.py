"""What may be looked at, and what goes together: told without torch, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = ["SIDE_BY_SIDE", "Heads", "What", "check_look"]

What = Literal["attention", "spectrum", "pca", "activation", "windows", "views"]
Heads = Literal["reading", "mean"]
"""Of a language model: the one that reads most (look/reading_head.py), or the mean over all."""
SIDE_BY_SIDE: tuple[What, ...] = ("spectrum", "pca")
"""Of several models at once."""


def check_look(
    what: What,
    *,
    models: int = 1,
    point: Sequence[float] | None = None,
    question: str | None = None,
    token: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    heads: Heads | None = None,
) -> None:
    """Raises ValueError for what does not go together, before a model is loaded. heads: where it is told."""
    if models > 1 and what not in SIDE_BY_SIDE:
        raise ValueError(f"{what} is of one model, got {models}; side by side are {', '.join(SIDE_BY_SIDE)}")
    if what == "attention" and (point is None) == (question is None):
        raise ValueError("attention is of a point or of an answer: give --point X,Y or --question TEXT")
    if what == "activation" and token is None:
        raise ValueError("activation is of a word: give --token WORD")
    if heads is not None and (what != "attention" or question is None or head is not None):
        raise ValueError("--heads chooses among those of an answer to a --question; leave it out, or --head")
    if question is not None and not question.strip():
        raise ValueError("the question is empty")
    for name, value, kinds in (
        ("point", point, ("attention",)),
        ("question", question, ("attention", "activation")),
        ("token", token, ("activation",)),
        ("layer", layer, ("attention",)),
        ("head", head, ("attention",)),
    ):
        if value is not None and what not in kinds:
            raise ValueError(f"--{name} says nothing about {what}; leave it out")
    if point is not None and not (len(point) == 2 and all(0 <= part <= 1 for part in point)):
        raise ValueError(f"a point is x,y in fractions of the picture's sides, 0 to 1, got {list(point)}")
