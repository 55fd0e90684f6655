"""JSON as people have it: with a byte order mark, as one document or a value a line, with a damaged line.

RFC 8259 allows UTF-8 alone and no mark; Windows' editors and shells write the mark, and UTF-16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["JsonLines", "is_there", "path_of", "place_of", "read_json", "read_list", "read_text"]

_NOT_JSON = (ValueError, RecursionError)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError of one line where it is none, OSError for no such file."""
    try:
        return json.loads(read_text(path))
    except _NOT_JSON as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_list(path: Path) -> Sequence[Any]:
    """The entries of a file that holds a JSON list, or a JSON value a line.

    Raises ValueError for a file of anything else, OSError for no such file.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except _NOT_JSON as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path} is not JSON: {error}") from None
        return JsonLines(text)
    if isinstance(value, list):
        return value
    if path.suffix == ".json":
        raise ValueError(f"{path} must hold a JSON list, or JSON a line, got a {type(value).__name__}")
    return JsonLines(text)


def path_of(folder: Path, name: str | Path) -> Path:
    r"""A file that data names, below a folder; written on Windows, with \ between folders."""
    path = folder / name
    if "\\" in str(name) and not os.path.exists(path):  # which takes names that no file can have
        path = folder / str(name).replace("\\", "/")
    return path


def is_there(folder: Path, name: str) -> bool:
    """Whether a file that data names lies below a folder; not one of a name that no file can have."""
    try:
        return path_of(folder, name).is_file()
    except (OSError, ValueError):
        return False


def place_of(entries: Sequence[Any], index: int) -> str:
    """An entry as people find it in the file: "line 7", or "entry 6" of a list, which counts from 0."""
    return f"line {entries.numbers[index]}" if isinstance(entries, JsonLines) else f"entry {index}"


class JsonLines(Sequence[Any]):
    """The values of a text that holds one in JSON a line; `numbers` are their lines', from 1.

    A value is read when it is asked for, and a line that is not JSON raises ValueError then.
    """

    def __init__(self, text: str) -> None:
        lines = enumerate(text.split("\n"), start=1)  # JSON may hold what else ends a line
        written = [(number, line) for number, line in lines if line.strip()]
        self.numbers = [number for number, _ in written]
        self._lines = [line for _, line in written]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        try:
            return json.loads(self._lines[index])
        except _NOT_JSON as error:
            raise ValueError(f"not JSON: {error}") from None


def read_text(path: Path) -> str:
    """In whichever Unicode encoding. Bytes that are no text become lone surrogates, which spoil the entry
    that holds them and no other.
    """
    raw = path.read_bytes()
    encoding = json.detect_encoding(raw)
    try:
        return raw.decode(encoding, "surrogateescape")
    except UnicodeDecodeError:
        raise ValueError(f"{path} begins as {encoding} and does not go on so") from None
