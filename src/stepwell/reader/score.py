"""How well a model reads: exact answers and right characters, by the height of the text and by kind of
question.

Answers are compared in capitals without blanks, since transcriptions of scans are reliable in neither.
Character accuracy is 1 - edit distance / length of the longer text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepwell.evaluate.metrics import edit_distance
from stepwell.models.ask import Assistant
from stepwell.reader.page import PageSample

__all__ = ["HEIGHTS", "ReadingScore", "character_accuracy", "height_band", "read_samples"]

HEIGHTS = (8, 11, 14, 19, 25)
"""Where the bands of text height begin, in pixels of the source image."""


@dataclass(frozen=True, slots=True)
class ReadingScore:
    """Of one group of questions: how many, the share answered exactly, the mean character accuracy."""

    count: int
    exact: float
    characters: float


def character_accuracy(answer: str, reference: str) -> float:
    """0 to 1; two empty texts agree."""
    answer, reference = _plain(answer), _plain(reference)
    longest = max(len(answer), len(reference))
    return 1.0 if not longest else 1.0 - edit_distance(answer, reference) / longest


def height_band(height: float) -> str:
    """A text height in pixels -> "14-18"; below the first band "<8", from the last on "25+"."""
    if height < HEIGHTS[0]:
        return f"<{HEIGHTS[0]}"
    start = max(i for i, begin in enumerate(HEIGHTS) if begin <= height)
    return f"{HEIGHTS[start]}-{HEIGHTS[start + 1] - 1}" if start + 1 < len(HEIGHTS) else f"{HEIGHTS[start]}+"


def read_samples(
    assistant: Assistant, samples: Iterable[PageSample], *, max_new_tokens: int = 64
) -> dict[str, ReadingScore]:
    """Asks every question of the samples on its own; questions about a line are grouped by its height in
    pixels, all others under "fields", and everything under "all".
    """
    results: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for sample in samples:
        if sample.image is None:
            raise ValueError("reading is measured on images; a sample has none")
        contents = [message["content"] for message in sample.messages]
        for question, right, line in zip(contents[::2], contents[1::2], sample.spelled, strict=True):
            question = question.replace("<image>", "").strip()
            answer = assistant.ask(sample.image, question, max_new_tokens=max_new_tokens)
            group = "fields" if line is None or "[" not in question else height_band(line.height)
            score = (_plain(answer) == _plain(right), character_accuracy(answer, right))
            results[group].append(score)
            results["all"].append(score)
    return {group: _score(scores) for group, scores in sorted(results.items())}


def _score(scores: Sequence[tuple[bool, float]]) -> ReadingScore:
    count = len(scores)
    return ReadingScore(
        count, sum(exact for exact, _ in scores) / count, sum(share for _, share in scores) / count
    )


def _plain(text: str) -> str:
    return "".join(text.upper().split())
