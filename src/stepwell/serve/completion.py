"""What a job tells, as OpenAI's clients read it: whole, or as a stream of events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from stepwell.serve.chat import ChatJob
from stepwell.serve.errors import ApiError
from stepwell.serve.numbers import Numbers
from stepwell.serve.receive import until as within
from stepwell.serve.rows import Ended

__all__ = ["Completion"]


class Completion:
    """The answer of one request. name: of the model; about: what the log will tell of the request, its `id`
    among it.
    """

    def __init__(self, job: ChatJob, *, name: str, numbers: Numbers, about: dict[str, Any]) -> None:
        self.job, self.name, self.numbers, self.about = job, name, numbers, about

    async def whole(self) -> Response:
        """When all is told. Raises ApiError."""
        pieces: list[str] = []
        while isinstance(item := await self.job.told.get(), str):
            pieces.append(item)
        if isinstance(item, ApiError):
            raise item
        usage = self._counted(item)
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": item.finish}
        return JSONResponse(self._of_kind("chat.completion", [choice], usage=usage))

    def stream(self, first: str | Ended, *, until: float, tells_usage: bool) -> Response:
        """first: what was told already. until: when its time is over, on the clock of the event loop."""

        async def lines() -> AsyncIterator[bytes]:
            async for fields in self._chunks(first, until, tells_usage):
                yield b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    async def _chunks(
        self, first: str | Ended, until: float, tells_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The pieces of an answer, and what goes wrong on the way."""
        yield self._chunk({"role": "assistant", "content": ""})
        item: str | Ended | ApiError = first
        try:
            while isinstance(item, str):
                yield self._chunk({"content": item})
                async with within(until):
                    item = await self.job.told.get()
        except ApiError as error:
            item = error
        if isinstance(item, ApiError):
            self.about["error"] = item.code or item.status
            yield item.body
            return
        yield self._chunk({}, item.finish)
        usage = self._counted(item)
        if tells_usage:
            yield self._of_kind("chat.completion.chunk", [], usage=usage)

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._of_kind("chat.completion.chunk", [choice])

    def _of_kind(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        about = {"id": f"chatcmpl-{self.about['id']}", "object": kind, "created": int(time.time())}
        return {**about, "model": self.name, "choices": choices, **more}

    def _counted(self, ended: Ended) -> dict[str, Any]:
        """The usage, which is counted and logged."""
        usage = self.job.usage(ended.new_tokens)
        of_prompt = usage["prompt_tokens_details"]
        counts = {
            "text": of_prompt["text_tokens"],
            "images": of_prompt["image_tokens"],
            "answer": ended.new_tokens,
        }
        self.numbers.count_tokens(**counts)
        self.about.update(tokens=counts, waited=round(self.job.waited, 3), finish=ended.finish)
        return usage
