"""Who waits, who runs: requests come in on the event loop, and a single thread holds the model.

A place is taken when a request begins and given back at its end, so that memory is bounded by the number of
places, and whoever finds none is told so at once. Jobs alike run together.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

from stepwell.ops.memory import is_about_memory
from stepwell.serve.errors import ApiError

__all__ = ["Job", "Place", "Scheduler"]

_PATIENCE = 10.0
"""Seconds that a run may still take when nobody waits for it."""

Run = Callable[[Sequence[Any]], None]
Tell = Callable[[BaseException], object]


class Job:
    """Something for the model's thread. key: jobs of one key may run together. run: is called with such
    jobs. What it tells comes out of `told`, on the event loop that made the job; an ApiError is the last of
    it. Whoever made it has the scheduler cancel it where nobody waits for it any more. One whose run fails is
    run again alone.
    """

    def __init__(self, key: Hashable, run: Run) -> None:
        self.key, self.run = key, run
        self.is_cancelled = self.is_done = False
        self.waited = 0.0  # seconds
        self._begun = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self.told: asyncio.Queue[Any] = asyncio.Queue()

    def tell(self, item: Any) -> None:
        """From any thread. What is no text is the last."""
        self.is_done = not isinstance(item, str)
        with suppress(RuntimeError):  # a loop that is gone listens no more
            self._loop.call_soon_threadsafe(self.told.put_nowait, item)

    def begin(self) -> None:
        self.waited = time.monotonic() - self._begun


class Place:
    """Of one request. `leave` gives it back, once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler: Scheduler | None = scheduler

    def leave(self) -> None:
        if self._scheduler is not None:
            self._scheduler.taken -= 1
            self._scheduler = None


class Scheduler:
    """batch: jobs that run together; queue: places beside those. on_fault: is called with errors of ours."""

    def __init__(self, *, batch: int, queue: int, on_fault: Tell = lambda error: None) -> None:
        self.batch, self.places, self.on_fault = batch, batch + queue, on_fault
        self.taken = 0  # places; of the event loop alone
        self.running = 0
        self.is_draining = False
        self._seconds = 1.0  # of a job, lately
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether jobs are run at all."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def enter(self) -> Place:
        """Raises ApiError where no place is free, and while the server stops."""
        if self.is_draining:
            raise _stopping()
        if self.taken >= self.places:
            ahead = math.ceil(self.taken * self._seconds / self.batch)
            raise ApiError(
                429,
                f"all {self.places} places of this server are taken: come again later",
                code="server_full",
                retry_after=max(1, min(ahead, 60)),
            )
        self.taken += 1
        return Place(self)

    def submit(self, job: Job) -> None:
        with self._changed:
            if self.is_draining:
                raise _stopping()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            job.is_cancelled = True
            with suppress(ValueError):
                self._waiting.remove(job)

    def drain(self) -> None:
        """What runs goes on; what waits is refused, and what comes."""
        with self._changed:
            self.is_draining = True
            while self._waiting:
                self._waiting.popleft().tell(_stopping())

    def stop(self) -> None:
        """When what runs is done, or has had time enough."""
        self.drain()
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)

    def _work(self) -> None:
        while jobs := self._next():
            self.running = len(jobs)
            started = time.monotonic()
            self._run(jobs)
            self._seconds += 0.2 * ((time.monotonic() - started) - self._seconds)
            self.running = 0

    def _next(self) -> list[Job]:
        """The job that waits longest, and those that run with it; none when all is over."""
        with self._changed:
            while True:
                if self._waiting:
                    key = self._waiting[0].key
                    jobs = [job for job in self._waiting if job.key == key][: self.batch]
                    for job in jobs:
                        self._waiting.remove(job)
                        job.begin()
                    return jobs
                if self._is_stopped:
                    return []
                self._changed.wait()

    def _run(self, jobs: Sequence[Job]) -> None:
        if (failure := self._failure(jobs)) is None:
            return
        if len(jobs) == 1:
            jobs[0].tell(failure)
            return
        for job in jobs:  # one of them, or all together, are too much
            if not (job.is_done or job.is_cancelled):
                self._run([job])

    def _failure(self, jobs: Sequence[Job]) -> ApiError | None:
        """Of a run; what was raised, and the tensors that it holds, are gone then."""
        try:
            jobs[0].run(jobs)
        except Exception as error:
            if not is_about_memory(error):
                with suppress(Exception):
                    self.on_fault(error)
            return _failed(error)
        return None


def _failed(error: Exception) -> ApiError:
    if is_about_memory(error):
        return ApiError(
            500, "not enough memory for this request: show smaller or fewer images", code="out_of_memory"
        )
    return ApiError(500, "a fault of the server, which its log tells")


def _stopping() -> ApiError:
    return ApiError(503, "this server is stopping", code="server_stopping", retry_after=5)
