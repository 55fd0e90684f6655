"""What a server allows: how much, how long, and from where."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """name: that requests call the model by. api_key: that requests under /v1 show, None asks for none.
    media_hosts: "host" or "host:port" that images may be fetched from. batch: requests that are answered
    together. queue: requests that may wait beside them. max_new_tokens: of an answer, whatever a request
    wants. max_images, max_text: of a request, the latter in characters. seconds: for a request, from its
    first byte to the answer's last. limits: of image files. decoders: processes that open images.

    Raises ValueError for numbers that cannot be.
    """

    name: str
    api_key: str | None = field(default=None, repr=False)
    media_hosts: frozenset[str] = frozenset()
    batch: int = 8
    queue: int = 32
    max_new_tokens: int = 512
    max_images: int = 16
    max_text: int = 100_000
    seconds: float = 120.0
    limits: ImageLimits = DEFAULT_LIMITS
    decoders: int = 2

    def __post_init__(self) -> None:
        counts = ("batch", "max_new_tokens", "max_images", "max_text", "decoders")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a server is at least 1, got {getattr(self, name)}")
        if self.queue < 0 or not 0 < self.seconds < 1e6:
            raise ValueError(
                f"a queue is at least 0, and the seconds of a request above 0 and below a million, got "
                f"{self.queue} and {self.seconds}"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("an API key is made of ASCII characters, and not empty")

    @property
    def max_body(self) -> int:
        """Bytes of a request: one image of the largest size in base64, or smaller ones, and the rest."""
        return int(min(self.limits.max_bytes, 10**9) * 4 / 3) + 4 * self.max_text + 100_000
