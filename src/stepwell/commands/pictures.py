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
    if not any(picture == STDIN or _is_file(Path(picture)) for picture in pictures):
        lacking = [picture for picture in pictures if not Path(picture).is_dir()]
        raise ValueError(f"no such file: {lacking[0]}" if lacking else f"no pictures in {', '.join(names)}")
    return pictures


def _behind(name: str) -> Iterator[str]:
    path = Path(name)
    found: list[str] = []
    if path.is_dir():
        found = [str(picture) for picture in images_below(path)]
    elif name != STDIN and not path.exists() and glob.has_magic(name):
        for match in sorted(glob.glob(name, recursive=True)):
            found += map(str, images_below(Path(match))) if Path(match).is_dir() else [match]
    yield from found or [name]


def _is_file(path: Path) -> bool:
    """Of any kind, such as a pipe."""
    return path.exists() and not path.is_dir()
