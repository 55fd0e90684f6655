"""The only switch between a readable reference and its fast twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

__all__ = ["Path", "choose", "prefer"]

Path = Literal["auto", "reference", "fast"]

_preferred: ContextVar[Path] = ContextVar("stepwell_path", default="auto")


@contextmanager
def prefer(path: Path) -> Iterator[None]:
    """Run the block on one path: "reference", "fast" (raises where there is none) or "auto" (fast if possible)."""
    if path not in ("auto", "reference", "fast"):
        raise ValueError(f"unknown path {path!r}; choose 'auto', 'reference' or 'fast'")
    token = _preferred.set(path)
    try:
        yield
    finally:
        _preferred.reset(token)


def choose(*, fast_ok: bool, why_not: str) -> bool:
    """True when an op should take its fast twin; `why_not` says what stands in the way when it cannot."""
    preferred = _preferred.get()
    if preferred == "fast" and not fast_ok:
        raise RuntimeError(f"fast path requested but {why_not}")
    return fast_ok and preferred != "reference"
