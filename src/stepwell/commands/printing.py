"""JSON on standard output, in whatever characters it takes; how far a command is, on a terminal."""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["print_json", "show_progress"]


def print_json(value: Any, *, indent: int | None = None) -> None:
    r"""A value as JSON; where standard output cannot encode it, characters past ASCII are \u escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    print(text, flush=True)


def show_progress(count: int, total: int) -> None:
    """A line that counts, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{count} of {total}", end="\n" if count == total else "", file=sys.stderr, flush=True)
