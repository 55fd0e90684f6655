"""A model, its thread, its decoders and what it counts: what the routes of a server stand on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from PIL.Image import Image
from starlette.requests import Request

from stepwell.images.limits import ImageError
from stepwell.serve.bodies import ChatBody, PredictBody
from stepwell.serve.chat import Chat, ChatJob
from stepwell.serve.decode import Decoder
from stepwell.serve.errors import ApiError, refusal
from stepwell.serve.fetch import Fetcher
from stepwell.serve.log import log_fault
from stepwell.serve.numbers import Numbers
from stepwell.serve.predict import Predict, PredictJob
from stepwell.serve.receive import unless_gone
from stepwell.serve.scheduler import Job, Scheduler
from stepwell.serve.served import served
from stepwell.serve.settings import ServerSettings

__all__ = ["Service"]

Kind = TypeVar("Kind", bound=Job)
_SLOW = 4.0
"""Times the processor time that a decoder may take: others work beside it."""


class Service:
    """model: an Assistant, or what predicts. Raises ValueError for another."""

    def __init__(self, model: Any, settings: ServerSettings) -> None:
        self.settings = settings
        found = served(model, settings.name, settings)
        self.chat = found if isinstance(found, Chat) else None
        self.predict = found if isinstance(found, Predict) else None
        self.scheduler = Scheduler(batch=settings.batch, queue=settings.queue, on_fault=log_fault)
        self.numbers = Numbers(waiting=lambda: self.scheduler.waiting, running=lambda: self.scheduler.running)
        self.decoder = Decoder(
            processes=settings.decoders, seconds=max(1.0, _SLOW * min(settings.limits.max_seconds, 600.0))
        )
        self.fetcher = Fetcher(settings.media_hosts, max_bytes=settings.limits.max_bytes)
        self._threads = ThreadPoolExecutor(max(8, 2 * settings.decoders), "images")
        self._is_running = False

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken, and answered."""
        return self._is_running and self.scheduler.is_alive and not self.scheduler.is_draining

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.scheduler.start()
        self.decoder.start()
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            await asyncio.to_thread(self.scheduler.stop)
            await asyncio.to_thread(self.decoder.stop)
            self._threads.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """What runs goes on, what waits and what comes is refused."""
        self.scheduler.drain()

    def open_image(self, source: str | bytes, is_over: Callable[[], bool]) -> Image:
        """Of a data: URL, of a URL on an allowed host, or of bytes; waits. is_over: whether nobody does so
        any more. Raises ImageError.
        """
        if is_over():
            raise ImageError("nobody waits for the image any more")
        if isinstance(source, str) and source[:5].lower() != "data:":
            source = self.fetcher.get(source)
        return self.decoder.open(source, self.settings.limits, is_over)

    async def chat_job(self, request: Request, body: ChatBody) -> ChatJob:
        """Submitted. Raises ApiError, and Gone."""
        chat = self.chat
        if chat is None:
            raise ApiError(404, "this server's model predicts, at /v1/predict, and answers no questions")
        self._check_model(body.model)
        return await self._submitted(
            request, lambda is_over: chat.job(body, lambda url: self.open_image(url, is_over))
        )

    async def predict_job(self, request: Request, body: PredictBody, image: str | bytes) -> PredictJob:
        """Submitted. Raises ApiError, and Gone."""
        predict = self.predict
        if predict is None:
            raise ApiError(404, "this server's model answers questions, at /v1/chat/completions")
        self._check_model(body.model)

        def prepared(is_over: Callable[[], bool]) -> Callable[[], PredictJob]:
            try:
                opened = self.open_image(image, is_over)
            except ValueError as error:
                raise refusal(error, param="image") from None
            return predict.job(body, opened)

        return await self._submitted(request, prepared)

    async def _submitted(
        self, request: Request, prepared: Callable[[Callable[[], bool]], Callable[[], Kind]]
    ) -> Kind:
        is_over = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            make = await unless_gone(request, loop.run_in_executor(self._threads, prepared, is_over.is_set))
        except BaseException:
            is_over.set()
            raise
        job = make()
        self.scheduler.submit(job)
        return job

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            raise ApiError(
                404,
                f"this server has one model, called {self.settings.name}",
                param="model",
                code="model_not_found",
            )
