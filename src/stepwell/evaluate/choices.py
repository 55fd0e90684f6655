"""Multiple choice: which letter an answer names, and whether it is the right one.

ScienceQA, arXiv 2209.09513, and SEED-Bench, arXiv 2307.16125, as LLaVA's evaluators read answers. Letters
count from A in the order of the choices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Literal

__all__ = ["Reader", "choice", "choice_letter", "right_letter", "with_choices"]

Reader = Literal["scienceqa", "seed"]
"""Official code: ScienceQA's wants a letter alone, "B. ", or "The answer is B" with something behind it;
SEED's the right letter and nothing else.
"""

_SCIENCEQA = "ABCDE"
_LETTER = re.compile(
    r"\s*(?:[(\[*]*(?P<alone>[A-Za-z])[.):,\]*]*\s*$"  # B, b., (B), **B**
    r"|\(?(?P<first>[A-Z])[.):](?=\s))"  # B. a fox
)
_ANSWER = re.compile(r"\banswer(?: is)?:? \(?(?P<named>[A-Z])(?:[.):,]|\s*$)", re.IGNORECASE)


def choice(
    prediction: str, answer: str, choices: Sequence[str] = (), *, official: Reader | None = None
) -> float:
    """1 where a prediction names the right choice: `answer`, its letter or its text.

    Raises ValueError for an answer that is none of the choices.
    """
    right = right_letter(answer, choices)
    return float(choice_letter(prediction, choices, official=official) == right)


def choice_letter(
    prediction: str, choices: Sequence[str] = (), *, official: Reader | None = None
) -> str | None:
    """The letter that a prediction names, None where it names none, or several.

    That is a letter alone or with marks around it, at the front with a mark behind it, or the only one behind
    "answer is"; or the text of one choice.
    """
    if official == "seed":
        return prediction
    if official == "scienceqa":
        return _scienceqa_letter(prediction)
    named = {match["named"].upper() for match in _ANSWER.finditer(prediction)}
    if (match := _LETTER.match(prediction)) is not None:
        named = {(match["alone"] or match["first"]).upper()}
    if not named:
        named = {letter for letter, text in _lettered(choices) if _plain(text) == _plain(prediction)}
    return named.pop() if len(named) == 1 else None


def _scienceqa_letter(prediction: str) -> str | None:
    if prediction in [*_SCIENCEQA]:
        return prediction
    if prediction[:1] in [*_SCIENCEQA] and prediction[1:3] == ". ":
        return prediction[0]
    named = re.findall(r"The answer is ([A-Z]).", prediction)
    return named[0] if len(named) == 1 else None


def right_letter(answer: str, choices: Sequence[str] = ()) -> str:
    """The letter of the right choice. Raises ValueError for what is none."""
    letters = ascii_uppercase[: len(choices) or None]
    letter = answer.strip().upper()
    if len(letter) == 1 and letter in letters:
        return letter
    named = [letter for letter, text in _lettered(choices) if _plain(text) == _plain(answer)]
    if len(named) == 1:
        return named[0]
    known = " or ".join([", ".join(letters), *(["the text of one choice"] if choices else [])])
    raise ValueError(f"the right choice is {known}, got {answer!r}")


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, each a line "A. text", unless it shows them that way already."""
    lines = [f"{letter}. {text}" for letter, text in _lettered(choices)]
    return question if all(line in question for line in lines) else "\n".join([question, *lines])


def _lettered(choices: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(ascii_uppercase, choices, strict=False))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
