"""Errors that say that memory is short: Python, torch on a CPU and torch on a GPU each have their own."""

from __future__ import annotations

__all__ = ["is_about_memory"]


def is_about_memory(error: Exception) -> bool:
    words = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words)
    )
