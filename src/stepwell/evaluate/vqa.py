"""VQA accuracy: an answer's share of agreement with ten people, after normalisation.

VQA, arXiv 1505.00468, and the evaluation server's normalisation, as LLaVA's evaluator of TextVQA has them.
`official=True` is the official code with its bugs: it strips 32 dots at most, takes the apostrophe out of
"somebody'd", and knows "Im" and its like in capitals alone, when all letters are small already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["PEOPLE", "vqa_accuracy", "vqa_normalised", "vqa_words"]

PEOPLE = 10
"""Answers that a question needs: the definition is of ten."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he i it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'m": "i",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could i might must not should they we what where who would you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}
"""Endings, and the words that are spelled out with them."""


def _spellings() -> dict[str, str]:
    """A contraction with one of its apostrophes left out -> the contraction."""
    words = [start + end for end, starts in _CONTRACTED.items() for start in starts.split()]
    return {word[:i] + word[i + 1 :]: word for word in words for i, c in enumerate(word) if c == "'"}


_SPELLINGS = _spellings()
_OFFICIAL_SPELLINGS = {
    left_out: word
    for left_out, word in _SPELLINGS.items()
    if not word.startswith("i'") and word != "somebody'd"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(prediction: str, answers: Sequence[str], *, official: bool = False) -> float:
    """The mean, over the ten people, of what the other nine make of a prediction: a third for everyone who
    said it, 1 at most. Raises ValueError unless there are ten answers.
    """
    if len(answers) != PEOPLE:
        raise ValueError(
            f"VQA accuracy is of the answers of {PEOPLE} people, got {len(answers)}; score by exact or anls"
        )
    said = vqa_normalised(prediction, official=official)
    agrees = [vqa_normalised(answer, official=official) == said for answer in answers]
    return sum(min(1, (sum(agrees) - own) / 3) for own in agrees) / PEOPLE


def vqa_normalised(text: str, *, official: bool = False) -> str:
    """Small letters without commas and question marks, "'s" a word of its own, then as `vqa_words`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_words(text.replace("\n", " ").replace("\t", " ").strip(), official=official)


def vqa_words(text: str, *, official: bool = False) -> str:
    """Words without punctuation and articles, numbers up to ten as digits, contractions with apostrophes.

    A punctuation mark goes if it stands next to a blank anywhere, or if digits are grouped by a comma; else
    each becomes a blank. VQAv2 puts references through this half alone.
    """
    groups_digits = re.search(r"\d,+\d", text) is not None
    words = text
    for mark in _PUNCTUATION:
        goes = groups_digits or f"{mark} " in text or f" {mark}" in text
        words = words.replace(mark, "" if goes else " ")
    words = re.sub(r"\.(?!\d)", "", words, count=32 if official else 0)
    numbered = [_NUMBERS.get(word, word) for word in words.lower().split()]
    spellings = _OFFICIAL_SPELLINGS if official else _SPELLINGS
    return " ".join(spellings.get(word, word) for word in numbered if word not in _ARTICLES)
