"""What was named, as rows in a fixed order: files, folders, patterns, lists, tars and Parquet files.

Rows come one by one, and no list of them is made: a folder is walked a folder at a time, a list is read line
by line, a tar by its headers, a Parquet file by its footer.
"""

from __future__ import annotations

import codecs
import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from stepwell.data.image_folder import walk_images
from stepwell.extract.rows import Row, named_place, plain_text
from stepwell.extract.tars import tar_rows
from stepwell.folders import is_url

__all__ = ["Source"]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Source:
    """Rows of what was named, in the order of the names; of a folder, however deep, in that of its files'
    names, hidden ones left out. What is named twice, or lies in a folder that is named, comes once.
    """

    def __init__(
        self, names: Sequence[str | Path] = (), *, listed: str | Path | None = None, column: str = "image"
    ) -> None:
        """names: files, folders, patterns. listed: a text file of a picture's path a line, which may be
        relative to its folder. column: of Parquet files.

        Raises ValueError for a name behind which there is nothing, and where there is no picture at all.
        """
        self.listed, self.column = None if listed is None else Path(listed), column
        self.names = _once(found for name in names for found in _behind(str(name)))
        if self.listed is not None and not self.listed.is_file():
            raise ValueError(f"no such file: {self.listed}")
        if column != "image" and not any(map(_is_parquet, self.names)):
            raise ValueError(f"column {column!r} is of Parquet files, and none is named{_hint(self.names)}")
        if not any(True for _ in islice(self.rows(), 1)):
            named = ", ".join([*map(str, names), *([str(listed)] if listed else [])]) or "nothing"
            raise ValueError(f"no pictures in {named}{_hint(self.names)}")

    def rows(self) -> Iterator[Row]:
        """From the first on, whenever it is called. Raises OSError for what cannot be read."""
        for name in self.names:
            yield from _rows_of(name, self.column)
        if self.listed is not None:
            for line in _lines(self.listed):
                yield Row(plain_text(line), named_place(self.listed.parent, line))

    def count(self) -> int | None:
        """How many rows there are; None where only reading all of a tar would tell."""
        counts = [_count_of(name, self.column) for name in self.names]
        if self.listed is not None:
            counts.append(sum(1 for _ in _lines(self.listed)))
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None


def _behind(name: str) -> list[str]:
    if os.path.exists(name):
        found = [name]
    elif is_url(name):
        raise ValueError(f"{name} is a URL; pictures are not fetched from the network, download them first")
    elif glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
    else:
        found = []
    if not found:
        raise ValueError(f"no such file: {name}")
    for path in found:
        if path.lower().endswith(_COMPRESSED):
            raise ValueError(
                f"{path} is compressed, and could only be read from its start; unpack it to a plain .tar"
            )
    return found


def _once(names: Iterable[str]) -> list[str]:
    places: dict[str, str] = {}
    for name in names:
        places.setdefault(os.path.abspath(name), name)
    folders = {place for place, name in places.items() if os.path.isdir(name)}
    return [name for place, name in places.items() if not folders.intersection(map(str, Path(place).parents))]


def _rows_of(name: str, column: str) -> Iterator[Row]:
    if os.path.isdir(name):
        for path in walk_images(name):
            yield Row(plain_text(path), os.path.abspath(path))
    elif _is_tar(name):
        yield from tar_rows(name)
    elif _is_parquet(name):
        yield from _parquet_rows(name, column)
    else:
        yield Row(plain_text(name), os.path.abspath(name))


def _count_of(name: str, column: str) -> int | None:
    if os.path.isdir(name):
        return sum(1 for _ in walk_images(name))
    if _is_parquet(name):
        from stepwell.extract.parquet_rows import count_parquet_rows

        return count_parquet_rows(name, column)
    return None if _is_tar(name) else 1


def _parquet_rows(name: str, column: str) -> Iterator[Row]:
    from stepwell.extract.parquet_rows import parquet_rows

    return parquet_rows(name, column)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        is_utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding, errors = ("utf-16", "replace") if is_utf16 else ("utf-8-sig", "surrogateescape")
        for line in io.TextIOWrapper(file, encoding, errors):
            if name := line.strip():
                yield name


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _hint(names: Sequence[str]) -> str:
    """For folders that hold archives: these are named themselves."""
    for name in names:
        for ending in ("tar", "parquet"):
            if os.path.isdir(name) and next(Path(name).glob(f"*.{ending}"), None):
                return f"; of the files there, name those you mean: '{os.path.join(name, f'*.{ending}')}'"
    return ""
