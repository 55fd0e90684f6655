"""What a command says of its work: JSON in whatever characters standard output takes, how far it is, what was
bad.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["print_json", "refuse_bad", "show_pace", "show_progress"]


def print_json(value: Any, *, indent: int | None = None) -> None:
    r"""A value as JSON; where standard output cannot encode it, characters past ASCII are \u escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    print(text, flush=True)


def refuse_bad(what: str, bad: Sequence[tuple[int, str, str]], count: int, page: Path) -> None:
    """Raises ValueError, when all is written, if some of `count` rows or images, `what` they are, were bad:
    each of them has a number, a place and a reason. page: of the report.
    """
    if bad:
        sys.stdout.flush()
        _, where, reason = bad[0]
        raise ValueError(
            f"{len(bad)} of {count} {what} are bad and in no score (all are in {page}); {where}: {reason}"
        )


def show_progress(count: int, total: int) -> None:
    """A line that counts, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{count} of {total}", end="\n" if count == total else "", file=sys.stderr, flush=True)


def show_pace(count: int, total: int | None, *, new: int, seconds: float) -> None:
    """As `show_progress`, with how many come a second, and the time left where the total is known. The line
    is not ended.

    new: of the count, in these seconds.
    """
    if not sys.stderr.isatty() or not seconds:
        return
    line = f"{count}{'' if total is None else f' of {total}'}, {new / seconds:.1f} a second"
    if total is not None and new:
        minutes, rest = divmod(round((total - count) * seconds / new), 60)
        line += f", {minutes // 60}:{minutes % 60:02}:{rest:02} left"
    print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
