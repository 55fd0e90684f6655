"""What a page offers: models, and a model at smaller views; and what each shows of a picture."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from PIL.Image import Image

from stepwell.flops.report import report
from stepwell.serve.bodies import ChatBody, ImagePart, ImageUrl, Message, PredictBody, TextPart
from stepwell.serve.chat import Chat, ChatJob, Shown
from stepwell.serve.errors import ApiError
from stepwell.serve.predict import Predict
from stepwell.serve.receive import until
from stepwell.serve.scheduler import Job, Scheduler
from stepwell.serve.served import served
from stepwell.serve.settings import ServerSettings
from stepwell.views.sheet import draw_views

__all__ = ["Choice", "Seen", "choices_of"]


class Seen(NamedTuple):
    """text: an answer so far, or what was found. drawn: the views and grids that the model saw, or what was
    found, in the picture. costs: in a line.
    """

    text: str
    drawn: Image | None = None
    costs: str = ""


class Choice(ABC):
    """One way to look at pictures. seconds: that an answer may take."""

    def __init__(self, scheduler: Scheduler, seconds: float) -> None:
        self.scheduler, self.seconds = scheduler, seconds

    @abstractmethod
    def look(self, images: Sequence[Image], question: str) -> AsyncIterator[Seen]:
        """Ever more of the answer. Raises ApiError."""

    async def _told(self, job: Job) -> AsyncIterator[Any]:
        """What the model's thread tells of a job."""
        place = self.scheduler.enter()
        end = asyncio.get_running_loop().time() + self.seconds
        try:
            self.scheduler.submit(job)
            while True:
                async with until(end):
                    item = await job.told.get()
                if isinstance(item, ApiError):
                    raise item
                yield item
                if not isinstance(item, str):
                    return
        finally:
            place.leave()
            self.scheduler.cancel(job)


class _Asked(Choice):
    """An assistant, through views of one size."""

    def __init__(self, chat: Chat, scheduler: Scheduler) -> None:
        super().__init__(scheduler, chat.settings.seconds)
        self.chat = chat

    async def look(self, images: Sequence[Image], question: str) -> AsyncIterator[Seen]:
        if not images or not question.strip():
            raise ApiError(400, "a question and a picture are wanted")
        started = time.monotonic()
        parts = [ImagePart(type="image_url", image_url=ImageUrl(url=str(i))) for i in range(len(images))]
        content: list[TextPart | ImagePart] = [*parts, TextPart(type="text", text=question)]
        body = ChatBody(messages=[Message(role="user", content=content)])
        job = (await asyncio.to_thread(self.chat.job, body, lambda number: images[int(number)]))()
        views = await asyncio.to_thread(_views, images, job.shown)
        text = ""
        async for item in self._told(job):
            if isinstance(item, str):
                text += item
                yield Seen(text, views)
            else:
                costs = await asyncio.to_thread(self._costs, job, item.new_tokens)
                yield Seen(text, views, f"{costs}, {time.monotonic() - started:.2f} s")

    def _costs(self, job: ChatJob, new_tokens: int) -> str:
        width = self.chat.engine.model.config.text_config.hidden_size
        gflops = 0.0
        for each in job.shown:
            layout = each.layout
            counted = report(each.sight.settings, size=layout.image_size, region=layout.region, out_dim=width)
            gflops += counted.gflops
        text = len(job.prompt) - job.visual_tokens
        return (
            f"{job.visual_tokens} visual and {text} text tokens, {new_tokens} new; "
            f"{gflops:.1f} GFLOPs of vision"
        )


class _Predicted(Choice):
    """A detector, a segmenter or a classifier."""

    def __init__(self, predict: Predict, scheduler: Scheduler, seconds: float) -> None:
        super().__init__(scheduler, seconds)
        self.predict = predict

    async def look(self, images: Sequence[Image], question: str) -> AsyncIterator[Seen]:
        if len(images) != 1:
            raise ApiError(400, "one picture is wanted")
        started = time.monotonic()
        job = (await asyncio.to_thread(self.predict.job, PredictBody(), images[0]))()
        async for found in self._told(job):
            drawn = await asyncio.to_thread(found.draw, images[0])
            lines = "\n".join([found.summary(), *found.lines()])
            yield Seen(lines, drawn, f"{time.monotonic() - started:.2f} s")


def choices_of(
    models: Mapping[str, Any], settings: ServerSettings, scheduler: Scheduler
) -> dict[str, Choice]:
    """models: names -> what `stepwell.load` gave. Names -> choices; of an assistant one for each size of its
    views. Raises ValueError for a model that answers and predicts nothing.
    """
    found: dict[str, Choice] = {}
    for name, model in models.items():
        looking = served(model, name, settings)
        if isinstance(looking, Predict):
            found[name] = _Predicted(looking, scheduler, settings.seconds)
            continue
        for sight in looking.sights:
            views = "" if sight.scale == 1 else f", views of {Fraction(sight.scale)} the size"
            found[name + views] = _Asked(Chat(looking.engine, settings, [sight]), scheduler)
    return found


def _views(images: Sequence[Image], shown: Sequence[Shown]) -> Image:
    """Of one picture, or the views of each below those of the one before."""
    geometry = shown[0].sight.geometry
    return draw_views(images, geometry, [each.layout.region for each in shown])
