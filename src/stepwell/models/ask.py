"""A model and its processor as one noun: ask about images, or take their features.

The same `ask` serves Python, the command line, evaluation and servers. Greedy decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import count, islice
from typing import Any, TypeVar

import torch
from PIL.Image import Image

from stepwell.images.limits import ImageLimits
from stepwell.images.open import image_size, open_image
from stepwell.models.engine import Each, Engine, TransformersEngine, padded, prompt_ids, tokens_left
from stepwell.models.looks import Asked, Look, Question, Seen, asked, check_image, is_image
from stepwell.structures import TokenLayout, VisionFeatures
from stepwell.views.region import region_edges, region_in_pixels, region_in_words, region_of_fractions

__all__ = ["Assistant", "as_assistant"]

Stream = Callable[[str], None]
Progress = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW = 8  # batches, among which images alike in layout are brought together


class Assistant:
    """Answers questions about images.

    Images may be whatever `stepwell.open_image` takes, or what `encode` made of them; several belong in one
    list. Files are opened within `limits`, of a call or of the assistant, or those that it was loaded with;
    one that `open_image` has opened is within its own.
    """

    limits: ImageLimits | None = None
    """Of image files, where they are not those that the assistant was loaded with."""

    commit: str | None = None
    """Of the hub, where the model came from there."""

    boxes_are_regions: bool
    """Whether the one box of fractions that a question about an image tells in words is its region; at first
    as the model's processor says.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        """A StepwellForConditionalGeneration and its StepwellProcessor. Raises ValueError naming the first
        setting in which the two differ.
        """
        self.engine: Engine = TransformersEngine(model, processor)
        self.model, self.processor = model, processor
        self.boxes_are_regions = self.engine.boxes_are_regions

    @classmethod
    def on(cls, engine: Engine) -> Assistant:
        """An assistant that stands on something else than transformers: it has no `model`."""
        assistant = cls.__new__(cls)
        assistant.engine = engine
        assistant.boxes_are_regions = engine.boxes_are_regions
        return assistant

    def __repr__(self) -> str:
        parts = [type(self.engine).__name__, str(self.engine.geometry)]
        if isinstance(model := getattr(self, "model", None), torch.nn.Module):
            first = next(model.parameters())
            size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            parts[0] = f"{type(model).__name__}, {size:.1f}M parameters, {first.dtype} on {first.device}"
        return f"Assistant({', '.join(parts)}{f', commit {self.commit}' if self.commit else ''})"

    def ask(
        self,
        image: Seen | Sequence[Seen],
        question: str | Sequence[str],
        *,
        region: Any = None,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
        each: Each | None = None,
        limits: ImageLimits | None = None,
    ) -> Any:
        """The answer to a question about an image, or about several; to a list of questions, their answers.

        region: that is looked at closely, (left, top, right, bottom) in pixels of the upright image; of
        several images a list of one for each, or None; see `boxes_are_regions` too. The images are encoded
        once, however many questions there are. `stream` is called with the text of one answer as it comes,
        `each` with the id of every token of it, that which ends it among them.
        An answer ends after `max_new_tokens`, or where the language model's positions end. Raises ValueError
        for an empty question, for images that cannot be read or are none, for a region outside its image or
        of a system of one view, and for a prompt that leaves no position for an answer. What is half a
        character in a question becomes U+FFFD.
        """
        if not isinstance(question, str | list | tuple):
            raise ValueError(f"a question is a text, or a list of texts, got {type(question).__name__}")
        questions = [question] if isinstance(question, str) else question
        answers = self.ask_many(
            [(image, text, region) for text in questions],
            max_new_tokens=max_new_tokens,
            stream=stream,
            each=each,
            limits=limits,
        )
        return answers[0] if isinstance(question, str) else answers

    def ask_many(
        self,
        questions: Iterable[Question],
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
        each: Each | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
        limits: ImageLimits | None = None,
    ) -> list[str]:
        """Answers to (image or images, question) pairs, each as it would be alone; a third entry is the
        region, as `ask` has it.

        `batch_size` questions are answered together: of the next eight batches' worth, those whose images
        are alike in layout, and those about the same image, which is then encoded once. `stream` and `each`
        take one pair; `progress` is called with the number of answers there are.
        """
        pairs = asked(questions)
        if (stream is not None or each is not None) and len(pairs) != 1:
            raise ValueError(f"only one question can be streamed at a time, got {len(pairs)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        within = self._within(limits)
        return within._in_alike_batches(
            [within._closely([within._held(look) for look in looks], text) for looks, text in pairs],
            lambda pair: pair[0],
            lambda batch: within._answers(batch, max_new_tokens, stream, each),
            batch_size,
            progress,
        )

    @torch.no_grad()  # inference tensors could not be learnt from
    def encode(
        self, image: Seen, *, region: Sequence[float] | None = None, limits: ImageLimits | None = None
    ) -> VisionFeatures:
        """Feature maps and visual tokens of one image, from one pass; `ask` takes them in its place. region:
        as of `ask`.
        """
        if isinstance(image, list | tuple) and not isinstance(image, VisionFeatures):
            raise ValueError("features and encode take one image; encode_many takes a list of them")
        within = self._within(limits)
        edges = None if region is None else region_edges(region)
        return within._encode([within._held(Look(image, edges))])[0]

    features = encode

    @torch.no_grad()
    def encode_many(
        self,
        images: Iterable[Seen],
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
        limits: ImageLimits | None = None,
    ) -> list[VisionFeatures]:
        """Of each image, in their order; `batch_size` are opened and encoded at a time.

        Eight batches' worth are taken from `images` before, and those alike in layout brought together.
        """
        if not isinstance(images, Iterable) or isinstance(images, dict) or is_image(images):
            raise ValueError(
                f"encode_many takes a list of images, got {type(images).__name__}; encode takes one"
            )
        within = self._within(limits)
        return within._in_alike_batches(
            (within._held(Look(image, None)) for image in images),
            lambda look: [look],
            within._encode,
            batch_size,
            progress,
        )

    def _encode(self, looks: Sequence[Look]) -> list[VisionFeatures]:
        opened = [self._opened(look.image) for look in looks]
        layouts = [self.layout(image, region=look.region) for image, look in zip(opened, looks, strict=True)]
        new = [
            (image, layout) for image, layout in zip(opened, layouts, strict=True) if isinstance(image, Image)
        ]
        inputs = [tensor for image, layout in new for tensor in self.engine.geometry.inputs(image, layout)]
        encoded = iter(self.engine.encode(inputs, [layout for _, layout in new]) if new else [])
        return [next(encoded) if isinstance(image, Image) else image for image in opened]

    def layout(
        self, image: Seen, *, region: Sequence[float] | None = None, limits: ImageLimits | None = None
    ) -> TokenLayout:
        """The views and visual tokens that an image will cost, from its size alone: no pixel is decoded.
        region: as of `ask`.
        """
        if isinstance(image, VisionFeatures):
            if region is not None:
                raise ValueError("what encode made of an image has its region: give it to encode")
            return image.layout
        check_image(image)
        size = image_size(image, limits=self._within(limits)._limits)
        return self.engine.geometry.layout_of(
            size, None if region is None else region_in_pixels(region, size)
        )

    def layouts(self, question: Question) -> list[TokenLayout]:
        """Of the images of a question as `ask_many` takes it, as that looks at them."""
        ((looks, text),) = asked([question])
        return [self.layout(look.image, region=look.region) for look in self._closely(looks, text)[0]]

    def _closely(self, looks: Sequence[Look], text: str) -> Asked:
        """A question, with the region that it tells in words."""
        look, *others = looks
        is_open = look.region is None and not isinstance(look.image, VisionFeatures)
        if others or not is_open or not self.boxes_are_regions:
            return looks, text
        box = region_in_words(text)
        if box is None:
            return looks, text
        region = region_of_fractions(box, self.layout(look.image).image_size)
        return [look._replace(region=region)], text

    @property
    def _limits(self) -> ImageLimits:
        return self.limits or self.engine.limits

    def _within(self, limits: ImageLimits | None) -> Assistant:
        """The assistant, with limits of its own."""
        if limits is None:
            return self
        within = copy(self)
        within.limits = limits
        return within

    def _held(self, look: Look) -> Look:
        """Of an image that can be looked at twice."""
        check_image(look.image)
        return look._replace(image=self._opened(look.image)) if hasattr(look.image, "read") else look

    def _opened(self, image: Seen) -> Image | VisionFeatures:
        if isinstance(image, VisionFeatures):
            return image
        return open_image(image, limits=self._limits)

    def _in_alike_batches(
        self,
        items: Iterable[Item],
        looks_of: Callable[[Item], Sequence[Look]],
        run: Callable[[list[Item]], list[Result]],
        batch_size: int,
        progress: Progress | None,
    ) -> list[Result]:
        """run: a batch of items -> a result each. Its results for all items, in the items' order."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        results: list[Result] = []
        for window in _batches(items, WINDOW * batch_size):
            order: Sequence[int] = range(len(window))
            if len(window) > batch_size:
                first: dict[Any, int] = defaultdict(count().__next__)  # which came first: sizes, images
                keys = [
                    [
                        (first[self.layout(look.image, region=look.region).inputs], first[look.key])
                        for look in looks_of(item)
                    ]
                    for item in window
                ]
                order = sorted(order, key=keys.__getitem__)
            found: dict[int, Result] = {}
            for batch in _batches(order, batch_size):
                found |= zip(batch, run([window[i] for i in batch]), strict=True)
                if progress is not None:
                    progress(len(results) + len(found))
            results += [found[i] for i in range(len(window))]
        return results

    @torch.inference_mode()
    def _answers(
        self, questions: Sequence[Asked], max_new_tokens: int, stream: Stream | None, each: Each | None
    ) -> list[str]:
        engine = self.engine
        opened = {
            look.key: Look(self._opened(look.image), look.region) for looks, _ in questions for look in looks
        }
        layouts = {key: self.layout(image, region=region) for key, (image, region) in opened.items()}
        keys = [[look.key for look in looks] for looks, _ in questions]
        rows = [
            self.prompt(text, [layouts[key] for key in row])
            for row, (_, text) in zip(keys, questions, strict=True)
        ]
        length = max(map(len, rows))
        left = tokens_left(engine, length)
        if len(rows) > 1 and max_new_tokens > left:  # together, all would end where the longest has to
            alone = [
                ([opened[key] for key in row], text) for row, (_, text) in zip(keys, questions, strict=True)
            ]
            return [self._answers([question], max_new_tokens, None, None)[0] for question in alone]
        features = dict(zip(opened, self._encode(list(opened.values())), strict=True))
        visual_tokens = torch.cat([features[key].tokens for row in keys for key in row])
        prompts = padded(engine, rows, visual_tokens)
        pieces = None if stream is None else _Pieces(engine.tokenizer, stream)
        heard = [hear for hear in (each, None if pieces is None else pieces.add) if hear is not None]
        ids = engine.answer(
            prompts,
            max_new_tokens=int(min(max_new_tokens, left)),
            each=None if not heard else lambda token: [hear(token) for hear in heard],
        )
        if pieces is not None:
            pieces.end()
        return [engine.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]

    def prompt(self, question: str, layouts: Sequence[TokenLayout]) -> list[int]:
        """The ids of a question behind its images, up to where its answer begins."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in layouts]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]
        return prompt_ids(self.engine, messages, layouts)


def as_assistant(model: object, name: str) -> Assistant:
    """What was loaded, if it answers questions. Raises ValueError otherwise."""
    if not isinstance(model, Assistant):
        raise ValueError(f"{name} answers no questions: it is a {type(model).__name__}")
    return model


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class _Pieces:
    """Hands the words of an answer to a function as they are finished."""

    def __init__(self, tokenizer: Any, stream: Stream) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.ids: list[int] = []
        self.told = 0  # characters

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self._text()
        self._tell(text[: 1 + max(text.rfind(" "), text.rfind("\n"))])

    def end(self) -> None:
        self._tell(self._text())

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.stream(text[self.told :])
            self.told = len(text)

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
