"""The nouns of an extraction: a row of what was named, where its picture lies, the picture.

A row is small and holds no picture, so that rows can be counted, skipped and sent to other machines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from stepwell.data.files import path_of
from stepwell.folders import is_url

__all__ = ["Cell", "Opened", "Part", "Place", "Row", "Shard", "digest_of", "named_place", "plain_text"]


class Part(NamedTuple):
    """A stretch of a file, such as a member of a tar, in bytes."""

    path: str
    offset: int
    size: int


class Cell(NamedTuple):
    """Of a column of a Parquet file: its row group, and its row in that."""

    path: str
    column: str
    group: int
    row: int


Place = str | bytes | Part | Cell
"""Of a picture: a path, the file's bytes, or where these are."""


class Row(NamedTuple):
    """id: as the output has it. mark: what else tells, without opening the picture, that it is the same.
    error: why there is no picture, one line.
    """

    id: str
    place: Place | None
    mark: str = ""
    error: str = ""


class Opened(NamedTuple):
    """A row's upright RGB picture, or why there is none."""

    id: str
    image: Image | None
    error: str = ""


class Shard(NamedTuple):
    """One file of the output: rows `number * shard_size` and on of the source."""

    number: int
    rows: list[Row]


def digest_of(rows: Iterable[Row]) -> str:
    """Alike for the same rows, of the same places, in the same order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.mark, row.place]).encode())
    return digest.hexdigest()[:32]


def named_place(folder: str | Path, name: str) -> str:
    """Of a picture that data names: a path from a folder on, as an absolute one; or a URL as it is, which
    `open_image` decodes where it holds the picture itself, and refuses otherwise.
    """
    if is_url(name) or name[:5].lower() == "data:":
        return name
    return os.path.abspath(path_of(Path(folder), name))


def plain_text(name: str) -> str:
    r"""A file's name as text that every format holds: bytes that are no UTF-8 become \udcxx."""
    return name.encode("utf-8", "backslashreplace").decode()
