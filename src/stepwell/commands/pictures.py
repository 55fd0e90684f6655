"""Which pictures a command was given: files, folders, patterns, or one on standard input."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepwell.data.image_folder import images_below

__all__ = ["STDIN", "find_pictures"]

STDIN = "-"


def find_pictures(names: Sequence[str]) -> list[str]:
    """Names as users type them -> of pictures, each once, in the order given; those of a folder, and what it
    holds, sorted. A name behind which there is nothing stays, to be reported with the pictures.

    Raises ValueError where no picture is left, and for what standard input cannot be.
    """
    if names.count(STDIN) > 1:
        raise ValueError("standard input (-) holds one picture; it was named more than once")
    if STDIN in names and sys.stdin.isatty():
        raise ValueError(
            "- reads a picture from standard input, which is a terminal here: use '< picture.jpg'"
        )
    found: dict[str, str] = {}
    for name in names:
        for picture in _behind(name):
            found.setdefault(picture if picture == STDIN else str(Path(picture).absolute()), picture)
    pictures = list(found.values())
    if not any(picture == STDIN or Path(picture).exists() for picture in pictures):
        what = f"no such file: {pictures[0]}" if pictures else f"no pictures in {', '.join(names)}"
        raise ValueError(what)
    return pictures


def _behind(name: str) -> Iterator[str]:
    path = Path(name)
    if path.is_dir():
        yield from map(str, images_below(path))
    elif name == STDIN or path.exists() or not glob.has_magic(name):
        yield name
    else:
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            yield name
        for match in matches:
            if not Path(match).is_dir():
                yield match
