"""The routes: /v1/chat/completions, /v1/models, /v1/predict, /health, /ready and /metrics.

Nothing here waits but by `await`: images are opened, and the model runs, elsewhere. A request takes one of
the server's places before its body is read, and gives it back when its answer is read.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepwell.serve.bodies import ChatBody, PredictBody, read_fields, read_json
from stepwell.serve.chat import ChatJob
from stepwell.serve.completion import Completion
from stepwell.serve.errors import ApiError
from stepwell.serve.log import log, log_fault
from stepwell.serve.predict import PredictJob
from stepwell.serve.receive import Gone, body_of, unless_gone, until
from stepwell.serve.scheduler import Job, Place
from stepwell.serve.service import Service

__all__ = ["App"]

_SENDING = 10.0
"""Seconds beyond those of a request, for the last of an answer to be read."""
_GONE = 499
"""What the log calls a request whose client hung up."""


class App:
    """As ASGI has it, around the routes of a service: keys, errors, counts and the log."""

    def __init__(self, service: Service) -> None:
        self.service = service
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/predict", self.predict, methods=["POST"]),
        ]
        self.routes = {route.path for route in routes}
        errors = {ApiError: _answer_error, HTTPException: _answer_http_error, Gone: _answer_gone}
        self._routes = Starlette(
            routes=routes,
            exception_handlers={**errors, Exception: _answer_fault},
            lifespan=lambda _: service.running(),
        )
        self._begun = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        started, told = time.monotonic(), {"status": _GONE}
        scope.setdefault("state", {})["about"] = about = {"id": uuid.uuid4().hex}

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
            await send(message)

        try:
            if scope["path"].startswith("/v1/") and not self._is_known(scope):
                error = ApiError(
                    401, "this server wants an API key, as a bearer token", code="invalid_api_key"
                )
                await _response_of(error)(scope, receive, sent)
            else:
                await self._routes(scope, receive, sent)
        except Exception as error:  # it was answered, and starlette raises it once more
            if not isinstance(error, Gone):
                log_fault(error)
        finally:
            seconds = time.monotonic() - started
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.service.numbers.count(route, told["status"], seconds)
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            log("request", **about, method=method, route=route, **told, seconds=round(seconds, 3))

    def _is_known(self, scope: Scope) -> bool:
        key = self.service.settings.api_key
        if key is None:
            return True
        shown = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(shown, b"Bearer " + key.encode("ascii"))

    async def health(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """It takes requests."""
        is_ready = self.service.is_ready
        return JSONResponse({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.numbers.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.service.settings.name:
            name = self.service.settings.name
            raise ApiError(404, f"this server has one model, called {name}", code="model_not_found")
        return JSONResponse(self._about_model())

    def _about_model(self) -> dict[str, Any]:
        name = self.service.settings.name
        return {"id": name, "object": "model", "created": self._begun, "owned_by": "stepwell"}

    async def chat(self, request: Request) -> ASGIApp:
        _check_type(request, "application/json")
        place = self.service.scheduler.enter()
        job: ChatJob | None = None
        end = asyncio.get_running_loop().time() + self.service.settings.seconds
        try:
            async with until(end):
                raw = await body_of(request, self.service.settings.max_body)
                body = await asyncio.to_thread(read_json, ChatBody, raw)
                del raw
                is_stream, options = body.stream, body.stream_options
                job = await self.service.chat_job(request, body)
                del body  # its images are large
                answer = Completion(
                    job,
                    name=self.service.settings.name,
                    numbers=self.service.numbers,
                    about=request.state.about,
                )
                if is_stream:
                    first = await unless_gone(request, job.told.get())  # what fails at once has a status
                    if isinstance(first, ApiError):
                        raise first
                    tells_usage = options is not None and options.include_usage
                    response = answer.stream(first, until=end, tells_usage=tells_usage)
                else:
                    response = await unless_gone(request, answer.whole())
        except BaseException:
            self._give_up(place, job)
            raise
        return self._sent(response, place, job, end)

    def _sent(self, response: Response, place: Place, job: Job, end: float) -> ASGIApp:
        """The response as it is sent, in the place of its request and not much beyond its time: a client that
        does not read would hold it for ever.
        """

        async def send_all(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(end + _SENDING):
                        await response(scope, receive, send)
            finally:
                self._give_up(place, job)

        return send_all

    def _give_up(self, place: Place, job: Job | None) -> None:
        """Of a request that is over, however: for a job that is not done nobody waits."""
        place.leave()
        if job is not None:
            self.service.scheduler.cancel(job)

    async def predict(self, request: Request) -> ASGIApp:
        """The image is in the JSON of the body, as a data: URL, or is the body."""
        kind = _check_type(request, "application/json", "application/octet-stream", "image/")
        place = self.service.scheduler.enter()
        job: PredictJob | None = None
        end = asyncio.get_running_loop().time() + self.service.settings.seconds
        try:
            async with until(end):
                raw = await body_of(request, self.service.settings.max_body)
                if kind == "application/json":
                    body = await asyncio.to_thread(read_json, PredictBody, raw)
                    if body.image is None:
                        raise ApiError(400, "image: it is missing", param="image")
                    image: str | bytes = body.image
                else:
                    body, image = read_fields(PredictBody, _query(request)), raw
                job = await self.service.predict_job(request, body, image)
                del raw, body, image  # large
                found = await unless_gone(request, job.told.get())
                if isinstance(found, ApiError):
                    raise found
                response = JSONResponse(await asyncio.to_thread(found.to_dict))  # of masks it takes a while
        except BaseException:
            self._give_up(place, job)
            raise
        request.state.about["waited"] = round(job.waited, 3)
        return self._sent(response, place, job, end)


def _check_type(request: Request, *kinds: str) -> str:
    """Raises ApiError for another type of body: browsers send a few to anybody, unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    for known in kinds:
        if kind == known or (known.endswith("/") and kind.startswith(known)):
            return known
    known = ", ".join(f"{known}*" if known.endswith("/") else known for known in kinds)
    raise ApiError(415, f"the Content-Type of a body is {known} here")


def _query(request: Request) -> dict[str, Any]:
    """Of tiles their `tile_size`, `tile_overlap` and `tile_scale`."""
    fields: dict[str, Any] = dict(request.query_params)
    tiles = {name[5:]: fields.pop(name) for name in list(fields) if name.startswith("tile_")}
    return fields | ({"tiles": tiles} if tiles else {})


def _response_of(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.code is not None:
        request.state.about["error"] = error.code
    return _response_of(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route", 405: "this route is not asked by this method"}
    response = _response_of(ApiError(error.status_code, words.get(error.status_code, "the request is wrong")))
    response.headers.update(error.headers or {})
    return response


async def _answer_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)  # to nobody, and for the log


async def _answer_fault(request: Request, error: Exception) -> Response:
    return _response_of(ApiError(500, "a fault of the server, which its log tells"))
