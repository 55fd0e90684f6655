"""A picture becomes a job of the model's thread, and what is found in it the answer of /v1/predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL.Image import Image

from stepwell.models.predicting import Predicts
from stepwell.serve.bodies import PredictBody, TilesBody
from stepwell.serve.errors import refusal
from stepwell.serve.scheduler import Job
from stepwell.views.tiling import Tiles

__all__ = ["Predict", "PredictJob"]

_USUAL_SIDE = 512  # of a tile, where a request leaves it to the model
_TIMES = 8
"""As often may a pixel be looked at, in the mean."""


class PredictJob(Job):
    """options: as `predict` takes them."""

    def __init__(self, predict: Predict, image: Image, options: dict[str, Any]) -> None:
        is_alone = options["tiles"] is not None
        super().__init__((predict, id(self) if is_alone else None, *map(str, options.values())), predict.run)
        self.image, self.options = image, options


class _Left(Exception):
    """Nobody waits for the prediction any more."""


class Predict:
    """Of one detector, segmenter or classifier. max_pixels: of a picture at the scale of its tiles."""

    def __init__(self, model: Predicts[Any], *, max_pixels: float) -> None:
        self.model, self.max_pixels = model, max_pixels

    def job(self, body: PredictBody, image: Image) -> Callable[[], PredictJob]:
        """In a thread; what it gives makes the job, on the event loop. Raises ApiError."""
        try:
            tiles = self._tiles(body.tiles, image)
            options: dict[str, Any] = {
                "threshold": body.threshold,
                "max_detections": body.max_detections,
                "tiles": tiles,
            }
            self.model.choice(**options)
        except ValueError as error:
            raise refusal(error) from None
        return lambda: PredictJob(self, image, options)

    def _tiles(self, asked: bool | TilesBody, image: Image) -> Tiles | None:
        """Raises ValueError where they would look at many times the pixels that an image may have."""
        if isinstance(asked, bool):
            return Tiles() if asked else None
        tiles, size = Tiles(**asked.model_dump(exclude_none=True)), (image.height, image.width)
        side = tiles.size or _USUAL_SIDE
        height, width = tiles.scaled(size)
        looked_at = tiles.count(size, side=side) * min(side, height) * min(side, width)
        if height * width > self.max_pixels or looked_at > _TIMES * self.max_pixels:
            raise ValueError("tiles of this size, overlap and scale are too many for this picture")
        return tiles

    def run(self, jobs: Sequence[PredictJob]) -> None:
        """In the model's thread: jobs of the same options. Ends between two tiles where nobody waits for it
        any more.
        """
        waiting = [job for job in jobs if not job.is_cancelled]

        def go_on(*_: object) -> None:
            if all(job.is_cancelled for job in waiting):
                raise _Left

        hook = self.model.register_forward_pre_hook(go_on)  # type: ignore[attr-defined]
        try:
            found = self.model.predict([job.image for job in waiting], **jobs[0].options)
        except _Left:
            return
        finally:
            hook.remove()
        for job, prediction in zip(waiting, found, strict=True):
            job.tell(prediction)
