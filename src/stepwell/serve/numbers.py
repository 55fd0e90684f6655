"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Numbers"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Numbers:
    """waiting, running: are asked how many requests do so."""

    def __init__(self, *, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "stepwell_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "stepwell_request_seconds",
            "From a request's first byte to its answer's last.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("stepwell_tokens", "Tokens read and made.", ["kind"], registry=self._registry)
        for name, text, number in (
            ("stepwell_waiting", "Requests that wait for the model.", waiting),
            ("stepwell_running", "Requests that the model works on.", running),
        ):
            Gauge(name, text, registry=self._registry).set_function(number)

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request that is over."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_tokens(self, **kinds: int) -> None:
        """Of an answer: text, images, answer."""
        for kind, number in kinds.items():
            self._tokens.labels(kind).inc(number)

    def text(self) -> bytes:
        return generate_latest(self._registry)
