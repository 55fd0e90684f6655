"""The only switch between a readable reference and its fast twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

__all__ = ["Path", "choose", "prefer"]

Path = Literal["auto", "reference", "fast"]

# A plain global: torch.compile traces reading one (guarded, a change recompiles) in every torch we support,
# and a ContextVar only in recent ones. It holds for the whole process, threads included.
_preferred: Path = "auto"


@contextmanager
def prefer(path: Path) -> Iterator[None]:
    """Run the block on one path: "reference", "fast" (an error without one) or "auto" (fast if possible)."""
    global _preferred
    if path not in ("auto", "reference", "fast"):
        raise ValueError(f"unknown path {path!r}; choose 'auto', 'reference' or 'fast'")
    before, _preferred = _preferred, path
    try:
        yield
    finally:
        _preferred = before


def choose(*, fast_ok: bool = True, why_not: str = "") -> bool:
    """True when an op should take its fast twin; `why_not` says what stands in the way when it cannot."""
    if _preferred == "fast" and not fast_ok:
        raise RuntimeError(f"fast path requested but {why_not}")
    return fast_ok and _preferred != "reference"
