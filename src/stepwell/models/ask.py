"""A model and its processor as one noun: ask about images, or take their features.

The same `ask` serves Python, the command line, evaluation and servers. Greedy decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from PIL.Image import Image

from stepwell.images.open import ImageSource, open_image
from stepwell.language.labels import label_tokens, tokens_of_image
from stepwell.language.prompt import render
from stepwell.models.engine import Engine, Prompts, TransformersEngine
from stepwell.structures import TokenLayout, VisionFeatures

__all__ = ["Assistant", "Question"]

Seen = ImageSource | VisionFeatures
"""An image, or what `encode` made of it."""
Question = tuple[Sequence[Seen], str]
"""Images and what is asked about them."""
Stream = Callable[[str], None]
Progress = Callable[[int], None]


class Assistant:
    """Answers questions about images.

    Images may be whatever `stepwell.open_image` takes, or what `encode` made of them; several belong in one
    list.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        """A StepwellForConditionalGeneration and its StepwellProcessor. Raises ValueError naming the first
        setting in which the two differ.
        """
        self.engine: Engine = TransformersEngine(model, processor)
        self.model, self.processor = model, processor

    @classmethod
    def on(cls, engine: Engine) -> Assistant:
        """An assistant that stands on something else than transformers: it has no `model`."""
        assistant = cls.__new__(cls)
        assistant.engine = engine
        return assistant

    def ask(
        self,
        image: Seen | Sequence[Seen],
        question: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
    ) -> Any:
        """The answer to a question about an image, or about several; to a list of questions, their answers.

        The images are encoded once, however many questions there are. `stream` is called with the text of one
        answer as it comes. An answer ends after `max_new_tokens`, or where the language model's positions
        end. Raises ValueError for an empty question, for images that cannot be read, and for a prompt that
        leaves no position for an answer.
        """
        is_several = isinstance(image, (list, tuple)) and not isinstance(image, VisionFeatures)
        images = list(cast("Sequence[Seen]", image)) if is_several else [cast(Seen, image)]
        questions = [question] if isinstance(question, str) else list(question)
        answers = self.ask_many(
            [(images, text) for text in questions], max_new_tokens=max_new_tokens, stream=stream
        )
        return answers[0] if isinstance(question, str) else answers

    def ask_many(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[str]:
        """Answers to (images, question) pairs, each as it would be alone.

        `batch_size` questions are answered together, and an image that several of them are about is encoded
        once. `stream` takes one pair; `progress` is called with the number of answers there are.
        """
        if stream is not None and len(questions) != 1:
            raise ValueError(f"only one question can be streamed at a time, got {len(questions)}")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for images, text in questions:
            _check(images, text)
        answers: list[str] = []
        for batch in _batches(questions, batch_size):
            answers += self._answers(batch, max_new_tokens, stream)
            if progress is not None:
                progress(len(answers))
        return answers

    def encode(self, image: Seen) -> VisionFeatures:
        """Feature maps and visual tokens of one image, from one pass; `ask` takes them in its place."""
        return self.encode_many([image])[0]

    features = encode

    @torch.inference_mode()
    def encode_many(
        self, images: Iterable[Seen], *, batch_size: int = 8, progress: Progress | None = None
    ) -> list[VisionFeatures]:
        """Of each image; `batch_size` are opened at a time, and those alike in layout encoded together."""
        features: list[VisionFeatures] = []
        for batch in _batches(images, batch_size):
            opened = [_opened(image) for image in batch]
            new = [image for image in opened if isinstance(image, Image)]
            layouts = [self._layout(image) for image in new]
            inputs = [
                tensor
                for image, layout in zip(new, layouts, strict=True)
                for tensor in self.engine.geometry.inputs(image, layout)
            ]
            encoded = iter(self.engine.encode(inputs, layouts) if new else [])
            features += [next(encoded) if isinstance(image, Image) else image for image in opened]
            if progress is not None:
                progress(len(features))
        return features

    def layout(self, image: ImageSource) -> TokenLayout:
        """The views and visual tokens that an image will cost, without running the model."""
        return self._layout(open_image(image))

    def _layout(self, image: Image | VisionFeatures) -> TokenLayout:
        if isinstance(image, VisionFeatures):
            return image.layout
        return self.engine.geometry.layout((image.height, image.width))

    @torch.inference_mode()
    def _answers(
        self, questions: Sequence[Question], max_new_tokens: int, stream: Stream | None
    ) -> list[str]:
        engine = self.engine
        opened = {_key(image): _opened(image) for images, _ in questions for image in images}
        layouts = {key: self._layout(image) for key, image in opened.items()}
        keys = [[_key(image) for image in images] for images, _ in questions]
        rows = [
            self._prompt(text, [layouts[key] for key in row])
            for row, (_, text) in zip(keys, questions, strict=True)
        ]
        length = max(map(len, rows))
        if engine.max_positions is not None:
            if length >= engine.max_positions:
                raise ValueError(
                    f"the question with its images takes {length} tokens, and the language model was made "
                    f"for {engine.max_positions}; show smaller or fewer images"
                )
            if len(rows) > 1 and length + max_new_tokens > engine.max_positions:
                # Together, all would end where the longest has to.
                alone = [
                    ([opened[key] for key in row], text)
                    for row, (_, text) in zip(keys, questions, strict=True)
                ]
                return [self._answers([question], max_new_tokens, None)[0] for question in alone]
            max_new_tokens = min(max_new_tokens, engine.max_positions - length)
        encoded = self.encode_many(opened.values(), batch_size=len(opened))
        features = dict(zip(opened, encoded, strict=True))
        filler = engine.tokenizer.pad_token_id or 0
        padding = [length - len(row) for row in rows]
        prompts = Prompts(
            torch.tensor([[filler] * n + row for n, row in zip(padding, rows, strict=True)]),
            torch.tensor([[False] * n + [True] * len(row) for n, row in zip(padding, rows, strict=True)]),
            torch.cat([features[key].tokens for row in keys for key in row]),
        )
        pieces = None if stream is None else _Pieces(engine.tokenizer, stream)
        ids = engine.answer(
            prompts, max_new_tokens=max_new_tokens, each=None if pieces is None else pieces.add
        )
        if pieces is not None:
            pieces.end()
        return [engine.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]

    def _prompt(self, question: str, layouts: Sequence[TokenLayout]) -> list[int]:
        """The ids of a question behind its images."""
        engine = self.engine
        content: list[dict[str, Any]] = [{"type": "image"} for _ in layouts]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]
        prompt = render(messages, engine.chat_template, engine.tokenizer, add_generation_prompt=True)
        images = [tokens_of_image(layout, engine.tokenizer, engine.image_token_id) for layout in layouts]
        return label_tokens(prompt, engine.tokenizer, images).input_ids


def _check(images: Sequence[Seen], question: str) -> None:
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if not images:
        raise ValueError("a question needs at least one image")


def _opened(image: Seen) -> Image | VisionFeatures:
    return image if isinstance(image, VisionFeatures) else open_image(image)


def _key(image: Seen) -> Any:
    """Alike for the same image given twice: a path by its name, what is opened by itself."""
    return str(image) if hasattr(image, "__fspath__") or isinstance(image, str) else id(image)


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
