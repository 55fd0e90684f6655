"""What a command says of its work: JSON in whatever characters standard output takes, how far it is, what was
bad.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["print_json", "refuse_bad", "show_progress"]


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
