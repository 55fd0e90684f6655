"""Scores of short answers: equal text, similar text (ANLS), right characters, numbers within 5 % (relaxed
accuracy).

ANLS: Biten et al., arXiv 1905.13648, as LLaVA's evaluator of DocVQA and TextVQA has it; exact: LLaVA's
submission for GQA; relaxed accuracy: ChartQA, arXiv 2203.10244. A score is 0 to 1, the best over the answers
that are right. `official=True` is the official code with its bugs.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["anls", "characters", "edit_distance", "exact", "gqa_submission", "relaxed", "spelled_alike"]

TOLERANCE = 0.05
"""Of relaxed accuracy, relative to the number that is right."""


def exact(prediction: str, answers: Sequence[str], *, official: bool = False) -> float:
    """1 for an answer, whatever its capitals, blanks and last dots.

    official: the prediction alone is put into small letters, and keeps its outer blanks.
    """
    if official:
        return float(gqa_submission(prediction) in answers)
    return float(_plain(prediction) in map(_plain, answers))


def gqa_submission(prediction: str) -> str:
    """What LLaVA hands to the evaluator of GQA, which compares it as it is."""
    return prediction.rstrip(".").lower()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def anls(prediction: str, answers: Sequence[str], *, official: bool = False) -> float:
    """Average normalised Levenshtein similarity: 1 - edits / length of the longer text, 0 below a half.

    Capitals and outer blanks do not count. Two empty texts are equal; official: they raise ZeroDivisionError.
    """
    said = prediction.lower().strip()
    scores = [_similarity(said, answer.lower().strip(), official) for answer in answers]
    return max(score if score >= 0.5 else 0.0 for score in scores)


def _similarity(a: str, b: str, official: bool) -> float:
    longest = max(len(a), len(b))
    if official and not longest:
        raise ZeroDivisionError("the official code divides by the length of an answer, which is empty")
    return 1 - edit_distance(a, b) / longest if longest else 1.0


def spelled_alike(prediction: str, answers: Sequence[str]) -> float:
    """1 for an answer, whatever its capitals and blanks: transcriptions of scans are reliable in neither."""
    return float(_letters(prediction) in map(_letters, answers))


def characters(prediction: str, answers: Sequence[str]) -> float:
    """1 - edits / length of the longer text, capitals and blanks left aside; two empty texts are equal."""
    return max(_similarity(_letters(prediction), _letters(answer), official=False) for answer in answers)


def _letters(text: str) -> str:
    return "".join(text.upper().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, one row at a time."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def relaxed(prediction: str, answers: Sequence[str]) -> float:
    """1 for a number within 5 % of an answer, and for an answer's text, whatever its capitals.

    As published: a number is what Python's `float` takes, or that and "%"; of an answer that is 0, or no
    number, the text is compared as it stands.
    """
    return float(any(_is_relaxed(prediction, answer) for answer in answers))


def _is_relaxed(prediction: str, answer: str) -> bool:
    number, right = _number(prediction), _number(answer)
    if number is None or not right:
        return prediction.lower() == answer.lower()
    return abs(number - right) / abs(right) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
