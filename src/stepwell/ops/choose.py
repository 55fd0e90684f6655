"""The only switch between a readable reference and its fast twin."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path as FilePath
from typing import Literal

import torch

__all__ = ["Path", "choose", "has_slow_products", "prefer", "preferred"]

Path = Literal["auto", "reference", "fast"]
PROCESSOR_REPORT = FilePath("/proc/cpuinfo")  # on Linux


class _Preferred(threading.local):
    """A thread's own wish, "auto" at its start.

    Not a ContextVar, which torch.compile traces in recent torch only; an attribute of a thread-local is read
    and guarded (a change recompiles) in every torch we support.
    """

    def __init__(self) -> None:
        self.path: Path = "auto"


_preferred = _Preferred()


@contextmanager
def prefer(path: Path) -> Iterator[None]:
    """Run the block on one path: "reference", "fast" (an error without one) or "auto" (fast if possible).

    It holds for the calling thread alone: for what a block starts elsewhere, wish there.
    """
    if path not in ("auto", "reference", "fast"):
        raise ValueError(f"unknown path {path!r}; choose 'auto', 'reference' or 'fast'")
    before, _preferred.path = _preferred.path, path
    try:
        yield
    finally:
        _preferred.path = before


def preferred() -> Path:
    """What this thread wishes."""
    return _preferred.path


def choose(*, fast_ok: bool = True, why_not: str = "") -> bool:
    """True when an op should take its fast twin; `why_not` says what stands in the way when it cannot."""
    if _preferred.path == "fast" and not fast_ok:
        raise RuntimeError(f"fast path requested but {why_not}")
    return fast_ok and _preferred.path != "reference"


@cache
def has_slow_products() -> bool:
    """Whether torch's fp32 matrix products use half of this processor, and its convolutions all of it.

    By the processor's vendor, not by a measurement: two runs, and two processes of one training, give the
    same values.
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in PROCESSOR_REPORT.read_text(encoding="utf-8")
    except OSError:
        return "GenuineIntel" in platform.processor()
