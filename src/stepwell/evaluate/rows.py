"""Files of questions whose answers are known: {image, question, answers, type}, one a line, or a JSON list.

Names that others use are taken too: see `_FIELDS`. What is wrong with a row is told with its line, and spoils
no other row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from os.path import isfile
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from stepwell.data.files import path_of, place_of, read_list
from stepwell.evaluate.boxes import read_box
from stepwell.folders import is_url, one_line
from stepwell.language.characters import well_formed
from stepwell.structures import Box
from stepwell.views.region import regions_beside

__all__ = ["BadRow", "Row", "read_rows"]

_FIELDS = {
    "image": ("image", "images"),
    "question": ("question", "text"),
    "answers": ("answers", "answer", "label", "captions", "caption"),
    "type": ("type", "category", "question_type"),
    "question_id": ("question_id", "id"),
    "choices": ("choices", "options"),
    "box": ("box", "bbox"),
    "region": ("region",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question. images: files, or addresses, which nobody opens; names: of the images, as the file has
    them; box: (left, top, right, bottom); regions: that are looked at closely, in fractions, one an image or
    None.
    """

    entry: int  # its place among the file's, from 0
    where: str
    images: tuple[Path | str, ...]
    names: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    type: str = ""
    question_id: Any = None
    choices: tuple[str, ...] = ()
    box: Box | None = None
    regions: tuple[Any, ...] = ()


class BadRow(NamedTuple):
    """A row that cannot be asked, or whose answer cannot be judged. reason: one line."""

    entry: int
    where: str
    reason: str


def read_rows(
    data: str | Path, *, images: str | Path | None = None, limit: int | None = None
) -> list[Row | BadRow]:
    """The rows of a file in their order, the first `limit` of them.

    images: the folder that image paths start from, by default the file's, or the one above where the first
    image is there. Raises ValueError for a file that holds no rows, OSError for no such file.
    """
    data = Path(data)
    entries = read_list(data)
    if not entries:
        raise ValueError(f"{data} holds no questions; write {_FORM}, one a line")
    folder = data.parent if images is None else Path(images)
    rows = [_row(entries, index, folder) for index in range(len(entries))[:limit]]
    above = data.absolute().parent.parent
    if images is None and _are_in(above, rows):
        rows = [_row(entries, index, above) for index in range(len(entries))[:limit]]
    return rows


def _are_in(above: Path, rows: Sequence[Row | BadRow]) -> bool:
    """Whether the first image is not where its row says, but in the folder above: data sets keep files of
    questions in a folder beside that of the images.
    """
    first = next((row for row in rows if isinstance(row, Row)), None)
    return first is not None and not isfile(first.images[0]) and isfile(above / first.names[0])


_FORM = '{"image": "a.jpg", "question": "What is it?", "answers": ["a cat"]}'


def _row(entries: Sequence[Any], index: int, folder: Path) -> Row | BadRow:
    where = place_of(entries, index)
    try:
        return _read(entries[index], index, where, folder)
    except ValueError as error:
        return BadRow(index, where, one_line(error))


def _read(entry: Any, index: int, where: str, folder: Path) -> Row:
    if not isinstance(entry, Mapping):
        raise ValueError(f"a row is an object, got a {type(entry).__name__}; write {_FORM}")
    fields = {name: _first(entry, names) for name, names in _FIELDS.items()}
    names = _texts("image", fields["image"])
    question, *more = _texts("question", fields["question"])
    if more or not question.strip():
        raise ValueError(f"a row has one question, which is a text; write {_FORM}")
    choices = _choices(fields["choices"])
    box = _box(fields["box"])
    if fields["answers"] is None and box is None:
        raise ValueError(f"it has no answers; write {_FORM}")
    answers = _answers(fields["answers"], choices)
    if any(well_formed(text) != text for text in (question, *answers, *choices)):
        raise ValueError("it has bytes that are no UTF-8, or half a character")
    return Row(
        entry=index,
        where=where,
        images=tuple(name if is_url(name) else path_of(folder, name) for name in names),
        names=tuple(names),
        question=question,
        answers=answers,
        type="" if fields["type"] is None else str(fields["type"]),
        question_id=fields["question_id"],
        choices=choices,
        box=box,
        regions=tuple(regions_beside(fields["region"], len(names))),
    )


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of the fields that says something."""
    given = (entry.get(name) for name in names)
    return next((value for value in given if value is not None and value not in ("", [], {})), None)


def _texts(name: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"it has no {name}; write {_FORM}" if value is None else f"its {name} is no text")
    return texts


def _answers(value: Any, choices: Sequence[str]) -> tuple[str, ...]:
    """Texts, numbers, or VQA's {"answer": text}, one or many; the number of a choice counts from 0."""
    answers = []
    for answer in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(answer, Mapping):
            answer = answer.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"an answer is a text or a number, got a {type(answer).__name__}")
        if choices and isinstance(answer, int):
            if not 0 <= answer < len(choices):
                raise ValueError(f"the right choice is 0 to {len(choices) - 1}, got {answer}")
            answer = ascii_uppercase[answer]
        answers.append(str(answer))
    return tuple(answers)


def _choices(value: Any) -> tuple[str, ...]:
    """A list of texts, or an object whose keys are letters."""
    if isinstance(value, Mapping):
        letters = sorted(value)
        if letters != [*ascii_uppercase[: len(letters)]]:
            raise ValueError(f"the letters of its choices are {', '.join(letters)}; they run from A on")
        value = [value[letter] for letter in letters]
    choices = [] if value is None else value
    if not isinstance(choices, list) or len(choices) > len(ascii_uppercase):
        raise ValueError(f"its choices are a list of texts, {len(ascii_uppercase)} at most")
    return tuple(map(str, choices))


def _box(value: Any) -> Box | None:
    """Four numbers, or a text that holds "[a, b, c, d]"."""
    if isinstance(value, str):
        value = read_box(value) or value
    if value is None:
        return None
    is_box = isinstance(value, list | tuple) and len(value) == 4
    if not is_box or not all(isinstance(side, int | float) and _is_finite(side) for side in value):
        raise ValueError(f"a box is [left, top, right, bottom], got {value!r}"[:200])
    left, top, right, bottom = map(float, value)
    return left, top, right, bottom


def _is_finite(number: float) -> bool:
    try:
        return isfinite(number)
    except OverflowError:  # a whole number that no float holds
        return False
