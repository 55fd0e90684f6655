"""The wordings in which pages are asked about: what stands in a box, and a receipt's company, date, address, total.

Boxes are written as fractions of the picture's width and height with three decimals, left, top, right, bottom, as
LLaVA-1.5 writes its grounding data (arXiv 2310.03744).
"""

from __future__ import annotations

import random

from stepwell.structures import Box, Size

__all__ = ["ANSWER_SHORTLY", "BOX_FORMAT", "FIELD_QUESTIONS", "READ_QUESTIONS", "box_text", "field_question", "read_question"]

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


def read_question(box: Box, size: Size, chance: random.Random) -> str:
    """One of the wordings that ask for the text in a box."""
    return chance.choice(READ_QUESTIONS).format(box=box_text(box, size)) + _manner(chance)


def field_question(field: str, chance: random.Random) -> str:
    """One of the wordings that ask for a key field. Raises ValueError for a field without one."""
    if field not in FIELD_QUESTIONS:
        raise ValueError(f"no question asks for {field!r}; choose from {sorted(FIELD_QUESTIONS)}")
    return chance.choice(FIELD_QUESTIONS[field]) + _manner(chance)


def _manner(chance: random.Random) -> str:
    return ANSWER_SHORTLY if chance.random() < 0.5 else ""
