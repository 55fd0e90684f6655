"""Many questions from a file of JSON lines: `stepwell ask --jsonl FILE`.

A line is {"image": "a.jpg" or ["a.jpg", "b.jpg"], "question": "What?" or ["What?", "Who?"]}; image names are
relative to the file's folder. "region" is what is looked at closely, [left, top, right, bottom] in fractions
of the image, or a list of one, or null, for each image. What else a line holds is handed on, but for the
answer or the error of an earlier run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stepwell.folders import is_url, one_line
from stepwell.models.ask import Assistant
from stepwell.models.looks import Question
from stepwell.views.region import region_of_fractions, regions_beside

__all__ = ["QuestionLine", "answer_lines", "read_question_lines"]


@dataclass(frozen=True, slots=True)
class QuestionLine:
    """One line: its fields, and the (images, question) pairs that they mean. regions: in fractions, one an
    image or None.
    """

    fields: dict[str, Any]
    questions: list[tuple[Sequence[Path | str], str]]
    regions: Sequence[Any] = ()

    def asked_of(self, assistant: Assistant) -> list[Question]:
        """The questions, regions in pixels. Raises ValueError and OSError as opening images does."""
        if not any(self.regions):
            return list(self.questions)
        return [
            (images, text, [_in_pixels(assistant, *pair) for pair in zip(images, self.regions, strict=True)])
            for images, text in self.questions
        ]


def read_question_lines(path: str | Path) -> list[QuestionLine]:
    """All lines of a file, empty ones left out. Raises ValueError naming the first that is no question."""
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    lines = [
        _read(line, path.parent, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)  # JSON may hold other ends of lines
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} holds no questions; write {_FORM}, one a line")
    return lines


def answer_lines(
    assistant: Assistant, lines: Sequence[QuestionLine], *, max_new_tokens: int = 128, batch_size: int = 8
) -> Iterator[dict[str, Any]]:
    """The fields of each line with its `answer`, in order: a list where `question` is one.

    What cannot be answered has an `error`, one line, in place of its answer, and the others go on.
    """
    iterator = iter(lines)
    while batch := list(islice(iterator, batch_size)):
        try:
            questions = [question for line in batch for question in line.asked_of(assistant)]
            answers = iter(
                assistant.ask_many(questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
            )
            yield from [_with_answers(line, [next(answers) for _ in line.questions]) for line in batch]
        except (ValueError, OSError):
            yield from (_alone(assistant, line, max_new_tokens) for line in batch)


_FORM = '{"image": "a.jpg", "question": "What is it?"}'


def _read(line: str, folder: Path, place: str) -> QuestionLine:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); write {_FORM}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is a {type(fields).__name__}; write {_FORM}")
    images, questions = (_texts(fields.get(name), name, place) for name in ("image", "question"))
    paths = [image if is_url(image) else folder / image for image in images]  # open_image says what is wrong
    try:
        regions = regions_beside(fields.get("region"), len(images))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return QuestionLine(fields, [(paths, question) for question in questions], regions)


def _in_pixels(assistant: Assistant, image: Any, region: Any) -> Any:
    return None if region is None else region_of_fractions(region, assistant.layout(image).image_size)


def _texts(value: Any, name: str, place: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{place} needs a text, or a list of them, as its {name}; write {_FORM}")
    return texts


def _with_answers(line: QuestionLine, answers: list[str]) -> dict[str, Any]:
    return {**_asked(line), "answer": answers if isinstance(line.fields["question"], list) else answers[0]}


def _asked(line: QuestionLine) -> dict[str, Any]:
    """Its fields, without what an earlier run found."""
    return {name: value for name, value in line.fields.items() if name not in ("answer", "error")}


def _alone(assistant: Assistant, line: QuestionLine, max_new_tokens: int) -> dict[str, Any]:
    try:
        questions = line.asked_of(assistant)
        return _with_answers(line, assistant.ask_many(questions, max_new_tokens=max_new_tokens))
    except (ValueError, OSError) as error:
        return {**_asked(line), "error": one_line(error)}
