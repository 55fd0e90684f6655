"""A server of one model: from a socket to the last answer."""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import Any

import uvicorn

from stepwell.serve.app import App
from stepwell.serve.log import log
from stepwell.serve.service import Service
from stepwell.serve.settings import ServerSettings

__all__ = ["listen", "serve"]

_BACKLOG = 512
_STOPPING = 5.0
"""Seconds beside those of a request, for what runs to end."""


def listen(host: str, port: int) -> socket.socket:
    """Raises ValueError for an address that cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen on port {port} of {host}: {reason.lower()}") from None


def serve(model: Any, settings: ServerSettings, listening: socket.socket) -> None:
    """Answers until a signal ends it: SIGTERM and Ctrl-C finish what runs and refuse the rest.

    model: of `stepwell.load`. Raises ValueError for one that answers and predicts nothing.
    """
    service = Service(model, settings)
    host, port = listening.getsockname()[:2]
    log("start", model=settings.name, address=host, port=port)
    config = uvicorn.Config(
        App(service),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=int(settings.seconds + _STOPPING),
    )
    _Server(config, service).run(sockets=[listening])
    log("stop", model=settings.name)


class _Server(uvicorn.Server):
    """A first signal ends it in order; another Ctrl-C at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self.service.drain()
