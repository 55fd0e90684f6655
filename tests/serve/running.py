"""A server in a thread of the tests' process, on this machine's own address, and what it is asked with."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from PIL import Image

from stepwell.serve.app import App
from stepwell.serve.run import listen
from stepwell.serve.service import Service
from stepwell.serve.settings import ServerSettings

SIZES = [64, 256]
"""Of the shipped reader's views, in these tests."""


@dataclass
class Running:
    service: Service
    url: str
    log: list[dict[str, Any]] = field(default_factory=list)
    holds: threading.Event = field(default_factory=threading.Event)

    def post(self, path: str = "/v1/chat/completions", **request: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **request)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def ask(self, *content: Any, **fields: Any) -> httpx.Response:
        """content: texts, or parts."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        messages = [{"role": "user", "content": parts}]
        return self.post(json={"messages": messages, "max_tokens": 12, **fields})

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """The model's thread waits, until the event is set or the block is left; `holds` tells when."""
        self.holds.clear()
        free, engine = threading.Event(), self.service.chat.engine
        generate = engine.generate

        def held(*arguments: Any, **options: Any) -> Any:
            self.holds.set()
            assert free.wait(60)
            return generate(*arguments, **options)

        engine.generate = held
        try:
            yield free
        finally:
            free.set()
            self.until(lambda: self.service.scheduler.running == 0)
            del engine.generate

    def until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < end, "it has not come about"
            time.sleep(0.01)


@contextmanager
def run(model: Any, **settings: Any) -> Iterator[Running]:
    listening = listen("127.0.0.1", 0)
    service = Service(model, ServerSettings(**{"name": "reader", "max_new_tokens": 64, **settings}))
    server = uvicorn.Server(uvicorn.Config(App(service), log_config=None, access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    running = Running(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
    try:
        running.until(lambda: service.is_ready)
        yield running
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def picture(width: int = 120, height: int = 90, colour: Any = "teal") -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste(colour, (width // 4, height // 4, width // 2 + 1, height // 2 + 1))
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def data_url(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def part(image: Image.Image | bytes | str, *, region: Any = None, **more: Any) -> dict[str, Any]:
    """Of a message."""
    url = image if isinstance(image, str) else data_url(image if isinstance(image, bytes) else encoded(image))
    beside = {} if region is None else {"region": region}
    return {"type": "image_url", "image_url": {"url": url, **more}, **beside}
