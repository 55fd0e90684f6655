"""transformers' bar "Loading weights", left out where we load; its switch stays as the user set it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from transformers.utils.logging import set_tqdm_hook

__all__ = ["no_loading_bar"]

_lock = Lock()
_loading: Counter[int] = Counter()  # blocks that each thread is in
_hook_before: Callable[..., Any] | None = None


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Bars of transformers are not drawn in this block, by this thread; others draw theirs."""
    global _hook_before
    thread = get_ident()
    with _lock:
        if not _loading:
            _hook_before = set_tqdm_hook(_draw)
        _loading[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _loading[thread] -= 1
            if not _loading[thread]:
                del _loading[thread]
            if not _loading:
                set_tqdm_hook(_hook_before)


def _draw(bar: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if get_ident() in _loading:
        keywords = {**keywords, "disable": True}
    return bar(*arguments, **keywords) if _hook_before is None else _hook_before(bar, arguments, keywords)
