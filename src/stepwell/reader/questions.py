"""The wordings in which pages are asked about: what stands in a box, and a receipt's company, date, address,
total.

Boxes are written as fractions of the image's width and height with three decimals, left, top, right,
bottom, as LLaVA-1.5 writes its grounding data (arXiv 2310.03744).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stepwell.language.messages import IMAGE, Message
from stepwell.reader.page import Line
from stepwell.structures import Box, Size

__all__ = [
    "ANSWER_SHORTLY",
    "BOX_FORMAT",
    "FIELD_QUESTIONS",
    "HERE_QUESTIONS",
    "READ_QUESTIONS",
    "Asked",
    "asked_about",
    "asked_closely",
    "box_text",
    "fractions_of",
    "turns_about",
]

BOX_FORMAT = " The numbers are left, top, right and bottom as fractions of the image width and height."
ANSWER_SHORTLY = "\nAnswer the question using a single word or phrase."

READ_QUESTIONS = (
    "What text is written inside the region {box}?" + BOX_FORMAT,
    "What text is written inside the region {box}?",
    "What is written in {box}?",
    "Read the text in {box}.",
    "Read {box}",
)
HERE_QUESTIONS = (
    "What is written here?",
    "What does it say?",
    "What does it say here?",
    "Read this.",
    "Read the text.",
    "What text is this?",
)
"""Of a region that is shown, not told in words."""
FIELD_QUESTIONS: dict[str, tuple[str, ...]] = {
    "company": (
        "What is the name of the company that issued this receipt?",
        "What is the store or company name printed on the receipt?",
        "Which company issued this receipt?",
        "What is the name of the shop?",
        "Who issued this?",
    ),
    "date": (
        "On which date was this receipt issued?",
        "What is the date on this receipt?",
        "What is the date?",
        "When was this issued?",
    ),
    "address": (
        "What address is printed on this receipt for the seller?",
        "What is the address of the company on this receipt?",
        "What is the address?",
    ),
    "total": (
        "How much is the total on this receipt?",
        "What is the total amount of this receipt?",
        "How much is the total?",
        "What is the total?",
    ),
}


def box_text(box: Box) -> str:
    """In fractions of an image -> "[0.037, 0.376, 0.223, 0.405]"."""
    return "[" + ", ".join(f"{fraction:.3f}" for fraction in box) + "]"


def fractions_of(box: Box, size: Size) -> Box:
    """A box in pixels of an image of size (H, W) -> in fractions of it, what lies outside cut off."""
    height, width = size
    left, top, right, bottom = (
        min(max(value / side, 0.0), 1.0)
        for value, side in zip(box, (width, height, width, height), strict=True)
    )
    return left, top, right, bottom


def turns_about(
    lines: Sequence[Line], fields: Mapping[str, str], size: Size, *, reads: int, chance: random.Random
) -> tuple[tuple[Message, ...], tuple[Line | None, ...]]:
    """The questions of `asked_about`, shuffled, as turns with their answers; and the line that each answer
    spells. The first question holds the placeholder.
    """
    turns = asked_about(lines, fields, size, reads=reads, chance=chance)
    chance.shuffle(turns)
    messages: list[Message] = []
    for turn in turns:
        messages += _turn("" if messages else f"{IMAGE}\n", turn.question, turn.answer, chance)
    return tuple(messages), tuple(turn.line for turn in turns)


def asked_closely(line: Line, size: Size, chance: random.Random) -> tuple[tuple[Message, ...], Box]:
    """One question about a line whose region is shown closely, and that region in fractions of the image of
    size (H, W). Half of them tell its box in words too.
    """
    region = fractions_of(_loosened(line.box, chance), size)
    wordings = READ_QUESTIONS if chance.random() < 0.5 else HERE_QUESTIONS
    question = chance.choice(wordings).format(box=box_text(region))
    return tuple(_turn(f"{IMAGE}\n", question, line.text, chance)), region


def _turn(start: str, question: str, answer: str, chance: random.Random) -> list[Message]:
    manner = ANSWER_SHORTLY if chance.random() < 0.5 else ""
    return [
        {"role": "user", "content": start + question + manner},
        {"role": "assistant", "content": answer},
    ]


class Asked(NamedTuple):
    """A question about a page. kind: "read", or the name of a field; box: that a read question names, in
    fractions of the image.
    """

    kind: str
    question: str
    answer: str
    line: Line | None  # that the answer spells
    box: Box | None = None


def asked_about(
    lines: Sequence[Line], fields: Mapping[str, str], size: Size, *, reads: int, chance: random.Random
) -> list[Asked]:
    """A question for each key field, and one for each of up to `reads` lines.

    size = (H, W) of the image. A field that one line spells points to it. Raises ValueError for a field
    that no question asks for.
    """
    if unknown := sorted(fields.keys() - FIELD_QUESTIONS.keys()):
        raise ValueError(
            f"no question asks for {', '.join(unknown)}; fields are {', '.join(FIELD_QUESTIONS)}"
        )
    asked = [
        Asked(name, chance.choice(FIELD_QUESTIONS[name]), value, _place(lines, name, value))
        for name, value in fields.items()
    ]
    for line in chance.sample(lines, min(reads, len(lines))):
        box = fractions_of(_loosened(line.box, chance), size)
        question = chance.choice(READ_QUESTIONS).format(box=box_text(box))
        asked.append(Asked("read", question, line.text, line, box))
    return asked


def _place(lines: Sequence[Line], field: str, value: str) -> Line | None:
    """The stretch of a line that spells a field; amounts and dates by preference where their label stands."""
    label = field.upper()
    parts = [(line.part(value), line) for line in lines]
    places = [(part, line) for part, line in parts if part is not None]
    rows = [line.box for line in lines if label in line.text and "SUB" not in line.text]
    for part, line in places:
        middle = (line.box[1] + line.box[3]) / 2
        if any(top <= middle <= bottom for _, top, _, bottom in rows):
            return part
    return places[0][0] if places else None


def _loosened(box: Box, chance: random.Random) -> Box:
    """The box as people draw it: on every side up to a quarter of its height too far out, or a little too far
    in.
    """
    height = box[3] - box[1]
    left, top, right, bottom = (height * chance.uniform(-0.04, 0.25) for _ in range(4))
    return box[0] - left, box[1] - top, box[2] + right, box[3] + bottom
