"""A conversation with images becomes a job of the model's thread, which tells the answer piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from stepwell.models.engine import TransformersEngine, padded, prompt_ids, tokens_left
from stepwell.models.processor import StepwellProcessor
from stepwell.serve.answer import answer, end_tokens
from stepwell.serve.bodies import ChatBody, ImagePart, Message
from stepwell.serve.errors import ApiError, refusal
from stepwell.serve.rows import Row
from stepwell.serve.scheduler import Job
from stepwell.serve.settings import ServerSettings
from stepwell.serve.sights import Sight, choose_sight, sights_of
from stepwell.structures import TokenLayout
from stepwell.views.region import region_of_fractions

__all__ = ["Chat", "ChatJob", "Shown"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image as the vision system takes it."""

    sight: Sight
    layout: TokenLayout
    inputs: list[Tensor]


class ChatJob(Job):
    """shown: the images, in order; prompt: ids, with placeholders for their visual tokens; options: of its
    `Row`. Run again, it tells what it has not told yet.
    """

    def __init__(
        self,
        chat: Chat,
        shown: Sequence[Shown],
        prompt: Sequence[int],
        options: Mapping[str, Any],
    ) -> None:
        key = (chat, *((each.sight.scale, each.layout.inputs) for each in shown))
        super().__init__(key, chat.run)
        self.shown, self.prompt, self.options = shown, prompt, options
        self._told = self._seen = 0  # characters, in all and of this run

    def row(self, tokenizer: Any) -> Row:
        """For one run."""
        self._seen = 0
        return Row(tokenizer, tell=self.tell, **self.options)

    def tell(self, item: Any) -> None:
        if isinstance(item, str):
            seen, self._seen = self._seen, self._seen + len(item)
            item, self._told = item[max(0, self._told - seen) :], max(self._told, self._seen)
        if item != "":
            super().tell(item)

    @property
    def visual_tokens(self) -> int:
        return sum(each.layout.num_visual for each in self.shown)

    def usage(self, new_tokens: int) -> dict[str, Any]:
        """As OpenAI tells it, and of the prompt how many tokens are text and how many are images'."""
        length, visual = len(self.prompt), self.visual_tokens
        return {
            "prompt_tokens": length,
            "completion_tokens": new_tokens,
            "total_tokens": length + new_tokens,
            "prompt_tokens_details": {"text_tokens": length - visual, "image_tokens": visual},
        }


class Chat:
    """Of one model. sights: through which its images may be looked at, the largest first; None: all that it
    has.
    """

    def __init__(
        self, engine: TransformersEngine, settings: ServerSettings, sights: Sequence[Sight] | None = None
    ) -> None:
        self.engine, self.settings = engine, settings
        self.processor: StepwellProcessor = engine.processor
        self.sights = sights_of(engine) if sights is None else sights
        self.end = end_tokens(engine)

    def _images(self, body: ChatBody) -> list[ImagePart]:
        """The images of a conversation, in order. Raises ApiError for more, or more text, than is allowed."""
        settings = self.settings
        parts = [
            part for message in body.messages if isinstance(message.content, list) for part in message.content
        ]
        images = [part for part in parts if isinstance(part, ImagePart)]
        if len(images) > settings.max_images:
            raise ApiError(
                400,
                f"a request has at most {settings.max_images} images, got {len(images)}",
                param="messages",
            )
        texts = [message.content for message in body.messages if isinstance(message.content, str)]
        texts += [part.text for part in parts if not isinstance(part, ImagePart)]
        if (length := sum(map(len, texts))) > settings.max_text:
            raise ApiError(
                400,
                f"a request has at most {settings.max_text} characters of text, got {length}",
                param="messages",
                code="context_length_exceeded",
            )
        if body.messages[-1].role == "assistant":
            raise ApiError(400, "the last message is the assistant's own: ask something", param="messages")
        return images

    def job(self, body: ChatBody, open_image: Callable[[str], Image]) -> Callable[[], ChatJob]:
        """Opens the images, in a thread; what it gives makes the job, on the event loop. Raises ApiError."""
        messages = [_as_message(message) for message in body.messages]
        images = self._images(body)
        shown = []
        for part, region in zip(images, self.processor.regions(messages), strict=True):
            try:
                shown.append(self._shown(open_image(part.image_url.url), part, region, body.max_pixels))
            except ValueError as error:
                raise refusal(error, param="messages") from None
        try:
            prompt = prompt_ids(self.engine, messages, [each.layout for each in shown])
        except ValueError as error:
            raise refusal(error, param="messages") from None
        left = self._tokens_left(len(prompt))
        wanted = body.max_completion_tokens or body.max_tokens or self.settings.max_new_tokens
        options = {
            "end": self.end,
            "max_new_tokens": min(wanted, left),
            "temperature": body.temperature or 0.0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "seed": secrets.randbits(62) if body.seed is None else body.seed,  # drawn alike when run again
            "stop": tuple(body.stops),
        }
        return lambda: ChatJob(self, shown, prompt, options)

    def _shown(self, image: Image, part: ImagePart, region: Any, max_pixels: int | None) -> Shown:
        size = (image.height, image.width)
        pixels = None if region is None else region_of_fractions(region, size)
        sight, layout = choose_sight(
            self.sights, size, pixels, detail=part.image_url.detail, max_pixels=max_pixels
        )
        return Shown(sight=sight, layout=layout, inputs=sight.geometry.inputs(image, layout))

    def _tokens_left(self, length: int) -> int:
        try:
            return int(min(tokens_left(self.engine, length), self.settings.max_new_tokens))
        except ValueError as error:
            code = "context_length_exceeded"
            raise ApiError(400, str(error), param="messages", code=code) from None

    @torch.inference_mode()
    def run(self, jobs: Sequence[ChatJob]) -> None:
        """In the model's thread: jobs whose images are alike in layout."""
        longest = max(len(job.prompt) for job in jobs)
        longest += max(job.options["max_new_tokens"] for job in jobs)
        if len(jobs) > 1 and longest > (self.engine.max_positions or longest):
            for job in jobs:  # together, all would have positions up to the longest one's end
                self.run([job])
            return
        rows = [job.row(self.engine.tokenizer) for job in jobs]
        tokens = self._visual_tokens([each for job in jobs for each in job.shown])
        prompts = padded(self.engine, [job.prompt for job in jobs], tokens)
        answer(self.engine, prompts, rows, lambda i: jobs[i].is_cancelled)

    def _visual_tokens(self, shown: Sequence[Shown]) -> Tensor:
        """Of all images, in their order; those that look through the same views are encoded together."""
        found: dict[int, Tensor] = {}
        for sight in self.sights:
            own = [i for i, each in enumerate(shown) if each.sight is sight]
            inputs = [tensor for i in own for tensor in shown[i].inputs]
            layouts = [shown[i].layout for i in own]
            features = self.engine.encode(inputs, layouts, vision=sight.vision) if own else []
            found |= {i: of_image.tokens for i, of_image in zip(own, features, strict=True)}
        if not found:
            return torch.empty(0, self.engine.model.config.text_config.hidden_size)
        return torch.cat([found[i] for i in range(len(shown))])


_HELD = b""
"""In place of an image, which stands apart."""


def _as_message(message: Message) -> dict[str, Any]:
    """For templates: what people wrote is a part, in which no `<image>` is an image."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": [{"type": "text", "text": message.content}]}
    parts = [
        {"type": "image", "image": _HELD, "region": part.region}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": role, "content": parts}
