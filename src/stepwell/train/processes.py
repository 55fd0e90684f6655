"""The processes that train together, as torchrun starts them and tells each by its environment."""

from __future__ import annotations

import atexit
import gc
import os

import torch

__all__ = ["is_first", "leave_at_exit", "leave_group", "processes", "tell"]


def processes() -> int:
    """That train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Of them, the one that writes and tells."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    """The first prints it."""
    if is_first():
        print(text, flush=True)


def leave_at_exit() -> None:
    """For a process whose work ended well: where another fails, leaving in order would wait for it."""
    atexit.unregister(leave_group)
    atexit.register(leave_group)


def leave_group() -> None:
    """Ends gloo's threads while there is an interpreter: one that drops a tensor later aborts the process."""
    if torch.distributed.is_initialized():
        gc.collect()  # whoever holds the group keeps its threads
        torch.distributed.destroy_process_group()
