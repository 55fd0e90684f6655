"""One line of JSON a request, and one a fault of ours: without texts, images, addresses or keys."""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

__all__ = ["log", "log_fault"]


def log(event: str, **about: Any) -> None:
    """On standard error, where that can be written to."""
    line = {"time": round(time.time(), 3), "event": event, **about}
    with suppress(OSError, ValueError):
        print(json.dumps(line), file=sys.stderr, flush=True)


def log_fault(error: BaseException) -> None:
    """Where it came from; what it says may hold what a request said."""
    frames = traceback.extract_tb(error.__traceback__)
    log("fault", error=type(error).__name__, frames=[f"{f.filename}:{f.lineno} {f.name}" for f in frames])
