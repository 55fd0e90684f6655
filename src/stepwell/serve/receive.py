"""What a request may take: bytes, time, and no more than somebody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from stepwell.serve.errors import ApiError

__all__ = ["Gone", "body_of", "unless_gone", "until"]

Result = TypeVar("Result")


@asynccontextmanager
async def until(when: float) -> AsyncIterator[None]:
    """As `asyncio.timeout_at`. Raises ApiError."""
    try:
        async with asyncio.timeout_at(when):
            yield
    except TimeoutError:
        raise ApiError(504, "the time of this request is over", code="timeout") from None


class Gone(Exception):
    """The client hung up: nobody reads an answer."""


async def body_of(request: Request, most: int) -> bytes:
    """Raises ApiError for more than `most` bytes, before they are read where it says so, and Gone."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > most:
        raise _too_long(most)
    parts, length = [], 0
    try:
        async for part in request.stream():
            length += len(part)
            if length > most:
                raise _too_long(most)
            parts.append(part)
    except ClientDisconnect:
        raise Gone from None
    return b"".join(parts)


async def unless_gone(request: Request, result: Awaitable[Result]) -> Result:
    """What is waited for. Raises Gone where the client hangs up before; the body has to be read."""
    waiting = asyncio.ensure_future(result)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Gone
        return waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"a request has at most {most:,} bytes", code="request_too_large")
