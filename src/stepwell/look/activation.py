"""How alike a word and what stands at each place are: a text token against the levels of a pyramid.

LLaVA-UHD v2, arXiv 2412.13871, figure 7, as cosine similarities. The word is its embedding in the language
model, which an image does not change; the paper takes a hidden state. Levels are brought to the language
model's width by the layers that do so in the system: the projections of windows (LLaVA-UHD), the stacks of
the merge (PIIP). Other systems have no such layer for maps, and their visual tokens are compared on their
grids. Letters: C width, D the language model's width, (h, w) the grid of a map, N visual tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.fuse.merge import TokenMerge
from stepwell.fuse.windows import WindowAttention
from stepwell.look.subject import Subject
from stepwell.models.engine import Engine
from stepwell.structures import Box

__all__ = ["Activation", "activations", "similarity", "word_ids"]


class Activation(NamedTuple):
    """Of one map, or of the visual tokens of one grid."""

    name: str
    map: Tensor  # (h, w), -1 to 1; NaN where no token is
    box: Box  # that it lies over, in source pixels


def similarity(cells: Tensor, word: Tensor) -> Tensor:
    """cells (..., D), word (D,) -> (...,): cosines."""
    return F.cosine_similarity(cells.float(), word.float(), dim=-1)


@torch.no_grad()
def activations(subject: Subject, word: str, *, question: str | None = None) -> list[Activation]:
    """Of every level of every view whose maps a layer brings to the language model's width, and of the visual
    tokens. A word of several tokens is the mean of theirs. Raises ValueError as `word_ids` does, and for a
    model without visual tokens.
    """
    features = subject.features
    assert subject.assistant is not None
    engine = subject.assistant.engine
    ids = word_ids(engine, word, question=question)
    embedding = engine.words[ids].float().mean(0)
    projector: Any = getattr(subject.network, "projector", None)
    found = []
    for number, (map, view, _) in enumerate(features.maps):
        cells = _in_width(projector, map, number)
        if cells is not None:
            level = f" {map.shape[-1]} x {map.shape[-2]}"
            found.append(Activation(view.name + level, similarity(cells, embedding).cpu(), view.box))
    of_tokens = torch.cat([similarity(features.tokens, embedding).cpu(), torch.tensor([torch.nan])])
    for box, rows in features.layout.grids:
        places = torch.tensor([list(row) for row in rows])  # -1, no token, is the last
        found.append(Activation("visual tokens", of_tokens[places], box))
    return found


def word_ids(engine: Engine, word: str, *, question: str | None = None) -> list[int]:
    """The tokens of a word, by itself or as it first stands in a question. Raises ValueError for a word that
    is not in the question, or that the vocabulary has no tokens for.
    """
    if not word.strip():
        raise ValueError("the token is empty")
    text = word if question is None else question
    first = text.find(word)
    if first < 0:
        raise ValueError(f"the question has no {word!r}")
    encoded = engine.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = (
        (encoded.input_ids, encoded.offset_mapping)
        if hasattr(encoded, "offset_mapping")
        else (encoded["input_ids"], encoded["offset_mapping"])
    )
    last = first + len(word)
    found = [token for token, (start, end) in zip(ids, offsets, strict=True) if start < last and end > first]
    unknown = getattr(engine.tokenizer, "unk_token_id", None)
    if not found or (unknown is not None and unknown in found):
        raise ValueError(f"the vocabulary has no tokens for {word!r}")
    return found


def _in_width(projector: Any, map: Tensor, number: int) -> Any:
    """(C, h, w) -> (h, w, D), None where no layer does that; number: of the map among those of all views."""
    cells = map.movedim(0, -1)
    levelled: Any
    if isinstance(projector, WindowAttention):
        projection = projector.projections[number % len(projector.levels)]
        levelled = projector.norm(projection(cells))
        return levelled
    if isinstance(projector, TokenMerge):
        levelled = projector.stacks[number](cells.flatten(0, 1)[None])[0]
        return levelled.unflatten(0, cells.shape[:2])
    return None
