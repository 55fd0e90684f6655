"""The wordings in which pages are asked about: what stands in a box, and a receipt's company, date, address,
total.

Boxes are written as fractions of the image's width and height with three decimals, left, top, right,
bottom, as LLaVA-1.5 writes its grounding data (arXiv 2310.03744).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from stepwell.language.messages import IMAGE, Message
from stepwell.reader.page import Line
from stepwell.structures import Box, Size

__all__ = ["ANSWER_SHORTLY", "BOX_FORMAT", "FIELD_QUESTIONS", "READ_QUESTIONS", "box_text", "turns_about"]

BOX_FORMAT = " The numbers are left, top, right and bottom as fractions of the image width and height."
ANSWER_SHORTLY = "\nAnswer the question using a single word or phrase."

READ_QUESTIONS = (
    "What text is written inside the region {box}?" + BOX_FORMAT,
    "What text is written inside the region {box}?",
    "What is written in {box}?",
    "Read the text in {box}.",
    "Read {box}",
)
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


def box_text(box: Box, size: Size) -> str:
    """(box in pixels, (height, width)) -> "[0.037, 0.376, 0.223, 0.405]"."""
    height, width = size
    fractions = [value / side for value, side in zip(box, (width, height, width, height), strict=True)]
    return "[" + ", ".join(f"{min(max(fraction, 0.0), 1.0):.3f}" for fraction in fractions) + "]"


def turns_about(
    lines: Sequence[Line], fields: Mapping[str, str], size: Size, *, reads: int, chance: random.Random
) -> tuple[tuple[Message, ...], tuple[Line | None, ...]]:
    """Questions for all key fields and for up to `reads` lines, shuffled, with their answers; and the line
    that each answer spells. The first question holds the placeholder.

    size = (H, W) of the image. A field that one line spells points to it. Raises ValueError for a field
    that no question asks for.
    """
    if unknown := sorted(fields.keys() - FIELD_QUESTIONS.keys()):
        raise ValueError(
            f"no question asks for {', '.join(unknown)}; fields are {', '.join(FIELD_QUESTIONS)}"
        )
    turns: list[tuple[str, str, Line | None]] = [
        (chance.choice(FIELD_QUESTIONS[name]), value, _place(lines, name, value))
        for name, value in fields.items()
    ]
    for line in chance.sample(lines, min(reads, len(lines))):
        box = box_text(_loosened(line.box, chance), size)
        turns.append((chance.choice(READ_QUESTIONS).format(box=box), line.text, line))
    chance.shuffle(turns)
    messages: list[Message] = []
    for question, answer, _ in turns:
        start = "" if messages else f"{IMAGE}\n"
        manner = ANSWER_SHORTLY if chance.random() < 0.5 else ""
        messages += [
            {"role": "user", "content": start + question + manner},
            {"role": "assistant", "content": answer},
        ]
    return tuple(messages), tuple(line for *_, line in turns)


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
    """The box with margins as people leave them: up to a quarter of its height on every side."""
    room = (box[3] - box[1]) * 0.25
    left, top, right, bottom = (chance.uniform(0, room) for _ in range(4))
    return box[0] - left, box[1] - top, box[2] + right, box[3] + bottom
