"""Pictures opened in processes of their own, a few pieces ahead of the model, in the order of their rows.

One that hangs, or takes its process along, is a row with an error. The pool is pebble's.
"""

from __future__ import annotations

import faulthandler
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, TimeoutError
from itertools import islice
from math import isinf
from multiprocessing import get_context
from typing import Any, Protocol, Self

from pebble import ProcessExpired, ProcessPool
from PIL import Image

from stepwell.extract.rows import Cell, Opened, Part, Row
from stepwell.folders import one_line
from stepwell.images.limits import ImageError, ImageLimits
from stepwell.images.open import open_image

__all__ = [
    "Decoded",
    "Here",
    "Lost",
    "Openers",
    "Processes",
    "opened",
    "opened_in_order",
    "opened_in_time",
    "rows_of_a_task",
]

_WAITING = 60.0
"""Seconds for a picture beside its limit of processor time: for the disk, and for processes side by side."""

_STARTING = 120.0
"""Seconds for the first process to be there."""

_LARGE = 2**26
"""Pixels."""

Decoded = tuple[tuple[int, int], bytes] | str
"""(width, height) and the RGB bytes of a picture; or why there is none."""


class Lost(Exception):
    """What opened a piece did not come back; one of its pictures may be why."""


class Openers(Protocol):
    """piece: rows that are opened by one task. ahead: tasks that may be on their way at a time."""

    piece: int
    ahead: int

    def submit(self, rows: Sequence[Row]) -> Any:
        """Begins with a piece; what `result` is to be given."""

    def result(self, task: Any) -> list[Decoded]:
        """Of each row of the piece; waits. Raises Lost."""


def rows_of_a_task(limits: ImageLimits, *, most: int) -> int:
    """One where pictures may be large, whose pixels wait in memory until the model is there for them."""
    return most if limits.max_pixels <= _LARGE else 1


def opened(rows: Sequence[Row], limits: ImageLimits) -> list[Decoded]:
    """Each row's picture. Whatever is wrong with one is its own."""
    return [_decoded(row, limits) for row in rows]


def opened_in_order(rows: Iterable[Row], openers: Openers) -> Iterator[Opened]:
    """Rows as they come -> their pictures, in the same order."""
    pieces: deque[tuple[list[Row], Any]] = deque()
    coming = iter(rows)
    while True:
        while len(pieces) < openers.ahead and (piece := list(islice(coming, openers.piece))):
            pieces.append((piece, openers.submit(piece)))
        if not pieces:
            return
        piece, task = pieces.popleft()
        for row, decoded in zip(piece, _whole(piece, task, openers), strict=True):
            if isinstance(decoded, str):
                yield Opened(row.id, None, decoded)
            else:
                yield Opened(row.id, Image.frombytes("RGB", *decoded))


def _whole(piece: Sequence[Row], task: Any, openers: Openers) -> list[Decoded]:
    """Of every row; where the piece is lost, each is tried once more by itself."""
    try:
        return openers.result(task)
    except Lost:
        return [_alone(row, openers) for row in piece]


def _alone(row: Row, openers: Openers) -> Decoded:
    try:
        return openers.result(openers.submit([row]))[0]
    except Lost as error:
        return str(error)


def opened_in_time(rows: Sequence[Row], limits: ImageLimits) -> list[Decoded]:
    """As `opened`; where it takes too long this process ends, whatever lock a decoder holds."""
    seconds = (limits.max_seconds + _WAITING) * len(rows)
    with open(os.devnull, "w") as silent:
        if not isinf(seconds):
            faulthandler.dump_traceback_later(seconds, exit=True, file=silent)
        try:
            return opened(rows, limits)
        finally:
            faulthandler.cancel_dump_traceback_later()


class Here:
    """Opens pictures where it is asked to, without other processes."""

    piece = ahead = 1

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits

    def submit(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows

    def result(self, task: Sequence[Row]) -> list[Decoded]:
        return opened(task, self.limits)


class Processes:
    """So many processes that open pictures; a context, at whose end they are gone."""

    def __init__(self, count: int, limits: ImageLimits, *, seconds: float | None = None) -> None:
        """seconds: for a picture, before its process is ended."""
        self.count, self.limits = count, limits
        self.piece, self.ahead = rows_of_a_task(limits, most=4), count + 2
        self.seconds = seconds or limits.max_seconds + _WAITING

    def __enter__(self) -> Self:
        self._pool = self._new_pool()
        try:
            self._pool.schedule(opened, args=([], self.limits), timeout=_STARTING).result()
        except (TimeoutError, ProcessExpired, CancelledError, RuntimeError):
            self.__exit__()
            raise ValueError(
                "no process that opens pictures could be started: a script calls extract under "
                "`if __name__ == '__main__':`, or with processes=0"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def submit(self, rows: Sequence[Row]) -> Any:
        timeout = None if isinf(self.seconds) else self.seconds * len(rows)
        for is_again in (False, True):
            try:
                return self._pool.schedule(opened, args=(rows, self.limits), timeout=timeout)
            except RuntimeError:  # the pool is broken, which one idle process that is gone is enough for
                if is_again:
                    raise
                self._pool.stop()
                self._pool = self._new_pool()
        raise AssertionError

    def result(self, task: Any) -> list[Decoded]:
        try:
            found: list[Decoded] = task.result()
            return found
        except TimeoutError:
            raise Lost(f"opening it takes over {self.seconds:g} seconds") from None
        except (ProcessExpired, CancelledError, RuntimeError):
            raise Lost("the process that opened it is gone: memory may be short") from None

    def _new_pool(self) -> Any:
        return ProcessPool(max_workers=self.count, context=get_context("spawn"))


def _decoded(row: Row, limits: ImageLimits) -> Decoded:
    if row.place is None:
        return row.error
    try:
        place = _bytes_of(row.place, limits) if isinstance(row.place, Part) else row.place
        assert not isinstance(place, Cell)
        image = open_image(place, limits=limits)
        return image.size, image.tobytes()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError, TypeError) as error:
        is_folder = isinstance(row.place, str) and os.path.isdir(row.place)
        return "a folder, not a picture" if is_folder else one_line(error)
    except MemoryError:
        return "not enough memory to open it"


def _bytes_of(part: Part, limits: ImageLimits) -> bytes:
    """No more than tell that it is too large. Raises ImageError for a part that is not all there."""
    wanted = int(min(part.size, limits.max_bytes + 1))
    with open(part.path, "rb") as file:
        file.seek(part.offset)
        content = file.read(wanted)
    if len(content) < wanted:
        raise ImageError("the tar is cut off in the middle of it")
    return content
