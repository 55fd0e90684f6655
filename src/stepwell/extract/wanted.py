"""What is wanted of each picture; needs neither torch nor pyarrow, and is checked before these are there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import isinf
from typing import Any, Literal

from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.views.tiling import Tiles

__all__ = ["Store", "Wanted", "What"]

What = Literal["features", "tokens", "predict", "ask"]
Store = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """what: feature maps, visual tokens, predictions, or answers to a question. threshold, max_detections: of
    predictions; tiles: that they are made of, None for whole pictures. store: numbers of maps and tokens.
    batch: pictures, or tiles, that go through the model together, None for 1 on a CPU and 8 elsewhere.
    limits: of picture files.

    Raises ValueError for what does not go together.
    """

    what: What
    question: str | None = None
    max_new_tokens: int = 128
    threshold: float | None = None
    max_detections: int | None = None
    tiles: Tiles | None = None
    store: Store = "float32"
    batch: int | None = None
    limits: ImageLimits = field(default_factory=lambda: DEFAULT_LIMITS)

    def __post_init__(self) -> None:
        if (self.what == "ask") != bool(self.question and self.question.strip()):
            raise ValueError(
                f"'ask' needs a question, others take none; got {self.what!r} with {self.question!r}"
            )
        for setting in fields(self):
            of = [what for what, settings in _HANGS_ON.items() if setting.name in settings]
            if of and self.what not in of and getattr(self, setting.name) != setting.default:
                raise ValueError(
                    f"{setting.name} is for {' and '.join(map(repr, of))}, not for {self.what!r}"
                )
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"a batch is of 1 picture or more, got {self.batch}")

    def settings(self) -> dict[str, Any]:
        """What the columns hang on, for JSON: not the batch."""
        wanted = asdict(self)
        limits = {name: "inf" if isinf(limit) else limit for name, limit in wanted["limits"].items()}
        return {name: wanted[name] for name in ("what", *_HANGS_ON[self.what])} | {"limits": limits}


_HANGS_ON: dict[What, tuple[str, ...]] = {
    "features": ("store",),
    "tokens": ("store",),
    "predict": ("threshold", "max_detections", "tiles"),
    "ask": ("question", "max_new_tokens"),
}
"""Fields of `Wanted`."""
