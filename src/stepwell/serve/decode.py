"""Images that strangers sent, opened in processes of their own: a decoder that hangs, or eats all memory,
takes nothing along but its own request.

Many decoders hold Python's lock for as long as they run, so that threads would keep a server from answering.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from multiprocessing import get_context
from typing import Any

from pebble import ProcessExpired, ProcessPool
from PIL import Image

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.images.open import open_image

__all__ = ["Decoder"]

_STEP = 0.2
"""Seconds between two looks at whether anybody still waits for an image."""


class Decoder:
    """seconds: for an image, from the moment that a process takes it; one that takes longer is ended."""

    def __init__(self, *, processes: int, seconds: float) -> None:
        self.processes, self.seconds = processes, seconds
        self._lock = threading.Lock()
        self._is_stopped = False
        self._pool = self._new_pool()

    def open(
        self, source: str | bytes, limits: ImageLimits, is_over: Callable[[], bool] = lambda: False
    ) -> Image.Image:
        """As `open_image` of a file's bytes or a data: URL; waits. is_over: whether nobody does so any more.
        Raises ImageError.
        """
        if isinstance(source, str) and source[:5].lower() != "data:":
            raise ImageError("an image is sent as a data: URL")  # no text names a file
        for is_again in (False, True):
            try:
                future = self._scheduled(_decoded, source, limits)
                size, pixels = self._waited(future, is_over)
                return Image.frombytes("RGB", size, pixels)
            except TimeoutError:
                raise ImageError(f"decoding takes over {self.seconds:g} seconds") from None
            except ProcessExpired:
                raise ImageError("the process that decoded the image is gone: memory may be short") from None
            except RuntimeError:  # the pool is broken, which one idle process that is gone is enough for
                if is_again:
                    raise
            except Exception as error:
                if not self._is_stopped or isinstance(error, ImageError):
                    raise
                # Where a task is sent while the pool is stopped, pebble hands on what its closed pipe raises.
                raise ImageError("the server is stopping") from None
        raise AssertionError

    def start(self) -> None:
        """Processes that are there before the first image comes."""
        for _ in range(self.processes):
            self._scheduled(_warm)

    def stop(self) -> None:
        """What is being decoded ends, and whoever waits for it is told."""
        with self._lock:
            self._is_stopped = True
            self._pool.stop()
            self._pool.join()

    def _new_pool(self) -> Any:
        return ProcessPool(max_workers=self.processes, context=get_context("spawn"))

    def _scheduled(self, run: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with self._lock:
            if self._is_stopped:
                raise ImageError("the server is stopping")
            try:
                future: Future[Any] = self._pool.schedule(run, args=arguments, timeout=self.seconds)
            except RuntimeError:
                self._pool.stop()
                self._pool = self._new_pool()
                future = self._pool.schedule(run, args=arguments, timeout=self.seconds)
            return future

    def _waited(self, future: Future[Any], is_over: Callable[[], bool]) -> Any:
        while True:
            try:
                return future.result(timeout=_STEP)
            except TimeoutError:
                if future.done():
                    raise
            if is_over() or self._is_stopped:
                future.cancel()  # which ends its process
                raise ImageError("nobody waits for the image any more")


def _warm() -> None:
    pass


def _decoded(source: str | bytes, limits: ImageLimits) -> tuple[tuple[int, int], bytes]:
    image = open_image(source, limits=limits)
    return image.size, image.tobytes()
