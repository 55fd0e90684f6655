"""Lists of classes as people keep them beside maps of labels: names, numbers, colours, what is ignored."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.data.files import read_json, read_text
from stepwell.images.draw import Colour

__all__ = ["ClassList", "class_names", "read_classes"]

Labels = np.ndarray[Any, np.dtype[np.int64]]

_SEPARATOR = r"[\s,;]+"
_COLOUR = _SEPARATOR.join(rf"(?P<{name}>\d+)" for name in ("red", "green", "blue"))
_LINES = (
    re.compile(rf"(?P<id>\d+){_SEPARATOR}{_COLOUR}{_SEPARATOR}(?P<name>.+)"),
    re.compile(rf"{_COLOUR}{_SEPARATOR}(?P<name>.+)"),
    re.compile(rf"(?P<id>\d+){_SEPARATOR}(?P<name>\D.*?){_SEPARATOR}{_COLOUR}"),
    re.compile(rf"(?P<name>.+?){_SEPARATOR}{_COLOUR}"),
)
_COLUMNS = {
    "name": ("name", "class", "class_name", "label"),
    "id": ("id", "number", "index", "class_id", "label_id"),
    **{name: (name, name[0]) for name in ("red", "green", "blue")},
}
"""What a header may call them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassList:
    """Classes in the order in which they are learned.

    numbers: in a map of labels; by default from 0 on. colours: red, green, blue, in a map of colours; none
    where there is no such map. ignore: numbers and colours of pixels that belong to no class.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    colours: tuple[Colour, ...] = ()
    ignore: tuple[int | Colour, ...] = (255,)

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a list of classes is empty")
        if any(not 0 <= part <= 255 for colour in self.colours for part in colour):
            raise ValueError("a colour is three numbers of 0 to 255")
        numbers = self.numbers or (() if self.colours else tuple(range(len(self.names))))
        for what, values in (("number", numbers), ("colour", self.colours)):
            if values and len(values) != len(self.names):
                raise ValueError(f"{len(self.names)} classes have {len(values)} {what}s")
            if len({*values, *self.ignore}) < len(values) + len(set(self.ignore)):
                raise ValueError(f"every class needs a {what} of its own, which is not ignored")

    def labels(self, stored: Labels, *, ignored: int) -> Labels:
        """Numbers (H, W) or colours (H, W, 3) of a map -> places in `names` (H, W), or `ignored`.

        Raises ValueError naming the first value that is of no class.
        """
        if stored.ndim == 3 and not self.colours:
            if (stored != stored[..., :1]).any():
                raise ValueError("a map of colours, and the list of classes tells none")
            stored = stored[..., 0]  # grey, stored as a colour
        is_coloured = stored.ndim == 3
        keys = stored @ [1 << 16, 1 << 8, 1] if is_coloured else stored
        flat = keys.reshape(-1)
        # Runs of one value, of which there are far fewer than pixels.
        starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
        values, places = np.unique(flat[starts], return_inverse=True)
        known = self.colours if is_coloured else self.numbers or range(len(self.names))
        label_of: dict[Any, int] = {
            **dict.fromkeys(self.ignore, ignored),
            **{v: i for i, v in enumerate(known)},
        }
        told = [(v >> 16, v >> 8 & 255, v & 255) if is_coloured else v for v in values.tolist()]
        if strange := [value for value in told if value not in label_of]:
            raise ValueError(f"a map of labels holds {strange[0]}, which is of no class")
        labels = np.array([label_of[value] for value in told])[places]
        return np.repeat(labels, np.diff(starts, append=flat.size)).reshape(keys.shape)


def class_names(classes: ClassList | Sequence[str]) -> tuple[str, ...]:
    """The names of a source's classes, in the order of their labels."""
    return classes.names if isinstance(classes, ClassList) else tuple(classes)


def read_classes(path: Path) -> ClassList:
    """JSON: names in a list, {number: name}, or objects with `name` and maybe `id` and `color`, in a list or
    under `classes`, with an `ignore_index` beside them; or {name: number}. Text and CSV: a line a class, with
    or without three numbers that are its colour, in front of the name or behind it, and with those maybe its
    own number in front; or what a header says, such as id,name,r,g,b.

    Raises ValueError naming the file.
    """
    try:
        return _from_json(read_json(path)) if path.suffix.lower() == ".json" else _from_lines(read_text(path))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no list of classes: {error}") from None


def _from_json(content: Any) -> ClassList:
    fields = content if isinstance(content, Mapping) else {}
    entries = fields.get("classes", content)
    if isinstance(entries, Mapping):
        by_number = {number: name for name, number in entries.items() if isinstance(number, int)} or entries
        entries = [{"id": int(number), "name": name} for number, name in by_number.items()]
    entries = [_entry(entry) for entry in entries]
    ignore: list[Any] = [fields.get("ignore_index", 255)]
    kept = [(number, entry) for number, entry in _numbered(entries) if number != ignore[0]]
    ignore += [
        _colour(entry) for number, entry in _numbered(entries) if number == ignore[0] and "color" in entry
    ]
    return ClassList(
        names=tuple(str(entry["name"]) for _, entry in kept),
        numbers=tuple(number for number, _ in kept),
        colours=tuple(_colour(entry) for _, entry in kept if "color" in entry),
        ignore=tuple(ignore),
    )


def _entry(entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, str | int | float | Mapping):
        raise ValueError(f"{entry!r} is no name, and no object with one")
    return entry if isinstance(entry, Mapping) else {"name": entry}


def _numbered(entries: list[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return ((int(entry.get("id", place)), entry) for place, entry in enumerate(entries))


def _colour(entry: Mapping[str, Any]) -> Colour:
    colour = [int(part) for part in entry["color"]]
    if len(colour) != 3:
        raise ValueError(f"the colour of {entry['name']!r} is {entry['color']}, not red, green and blue")
    return colour[0], colour[1], colour[2]


def _from_lines(text: str) -> ClassList:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = _by_header(lines) or [_row(line) for line in lines]
    coloured = [row for row in rows if row.get("red") is not None]
    numbers = [int(row["id"]) for row in rows if row.get("id") is not None]
    return ClassList(
        names=tuple(row["name"] for row in rows),
        numbers=tuple(numbers),
        colours=tuple((int(row["red"]), int(row["green"]), int(row["blue"])) for row in coloured),
    )


def _row(line: str) -> dict[str, Any]:
    match = next(filter(None, (form.fullmatch(line) for form in _LINES)), None)
    return {"name": line} if match is None else match.groupdict()


def _by_header(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    """The lines below the first by its columns; None where it is no header."""
    if not lines:
        return None
    separator = next((each for each in ",;\t" if each in lines[0]), " ")
    header, *rows = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    told = [word.strip().lower() for word in header]
    places = {key: told.index(word) for key, words in _COLUMNS.items() for word in words if word in told}
    is_header = "name" in places and len(told) > 1 and len(rows) > 0
    if not is_header or (separator == " " and len(places) < len(told)):  # a name of several words
        return None
    if short := [row for row in rows if len(row) <= max(places.values())]:
        raise ValueError(f"the line {separator.join(short[0])!r} has fewer columns than the header")
    return [{key: row[place].strip() for key, place in places.items()} for row in rows]
