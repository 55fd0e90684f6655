"""Where an answer was read from, as boxes, and as `stepwell ask --json` tells it."""

from __future__ import annotations

from typing import Any, NamedTuple

from stepwell.look.trace import Traced
from stepwell.look.where import Heat, box_at_peak, heat_map
from stepwell.structures import Box

__all__ = ["ReadFrom", "read_from", "told"]


class ReadFrom(NamedTuple):
    """image: the one of which most was taken; the boxes are in its pixels."""

    image: int
    heat: Heat  # of all tokens of the answer together
    box: Box
    boxes: tuple[Box | None, ...]  # of every token; None where it is no text, or took nothing of the image


def read_from(traced: Traced) -> ReadFrom | None:
    """None where attention was not seen, or no visual token has a place in an image. Tokens that are no text,
    such as the one that ends an answer, are in no heat.
    """
    if traced.attention is None:
        return None
    spoken = [i for i, text in enumerate(traced.tokens) if text] or list(range(len(traced.tokens)))
    rows = traced.attention[spoken].float()
    taken = [
        float(traced.of_image(rows, number).sum()) if layout.grids else 0.0
        for number, layout in enumerate(traced.layouts)
    ]
    image = max(range(len(taken)), key=taken.__getitem__)
    layout = traced.layouts[image]
    if not layout.grids:
        return None
    heat = heat_map(layout, traced.of_image(rows, image).mean(0))
    if not float(heat.map.sum()) > 0:
        return None
    boxes: list[Box | None] = [None] * len(traced.tokens)
    for i, row in zip(spoken, traced.of_image(rows, image), strict=True):
        boxes[i] = _box(heat_map(layout, row))
    return ReadFrom(image, heat, box_at_peak(heat), tuple(boxes))


def told(traced: Traced, source: ReadFrom | None) -> dict[str, Any]:
    """`confidence` and `where` as plain JSON: boxes are (left, top, right, bottom) in source pixels."""
    where = None
    if source is not None:
        head = traced.head
        of_tokens = zip(traced.tokens, traced.probabilities.tolist(), source.boxes, strict=True)
        where = {
            "image": source.image,
            "box": _rounded(source.box),
            "head": "mean" if head is None else {"layer": head[0], "head": head[1]},
            "tokens": [
                {"text": text, "probability": round(probability, 4), "box": _rounded(box)}
                for text, probability, box in of_tokens
            ],
        }
    return {"confidence": round(traced.confidence, 4), "where": where}


def _box(heat: Heat) -> Box | None:
    return box_at_peak(heat) if float(heat.map.sum()) > 0 else None


def _rounded(box: Box | None) -> list[float] | None:
    return None if box is None else [round(edge, 1) for edge in box]
