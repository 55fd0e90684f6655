"""A model and its processor as one noun: ask about pictures, or take their features.

The same `ask` serves Python, the command line, evaluation and servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TextStreamer

from stepwell.images.open import ImageSource
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import FeatureMaps, TokenLayout

__all__ = ["Assistant", "Features"]

Stream = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Features:
    """What a vision system makes of one picture: maps (1, C, H, W) by stride in pixels, tokens (N, D)."""

    maps: FeatureMaps
    tokens: Tensor
    layout: TokenLayout


class Assistant:
    """Answers questions about pictures.

    Pictures may be PIL images, paths, bytes, data: URLs or uint8 arrays; several belong in one list.
    """

    def __init__(self, model: StepwellForConditionalGeneration, processor: StepwellProcessor) -> None:
        self.model = model.eval()
        self.processor = processor

    def ask(
        self,
        image: ImageSource | Sequence[ImageSource],
        question: str,
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
    ) -> str:
        """The answer to a question about a picture, or about several; `stream` is called with text as it
        comes.

        Greedy decoding. Raises ValueError for an empty question and for pictures that cannot be read.
        """
        pictures = image if isinstance(image, (list, tuple)) else [cast(ImageSource, image)]
        return self.ask_many([(pictures, question)], max_new_tokens=max_new_tokens, stream=stream)[0]

    @torch.inference_mode()
    def ask_many(
        self,
        questions: Sequence[tuple[Sequence[ImageSource], str]],
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
    ) -> list[str]:
        """Answers to (pictures, question) pairs in one batch, each as it would be alone. `stream` takes one
        pair."""
        if not questions:
            return []
        if stream is not None and len(questions) != 1:
            raise ValueError(f"only one question can be streamed at a time, got {len(questions)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        inputs = self.processor.prompt([_conversation(*pair) for pair in questions])
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[self.model.config.image_token_id],
            streamer=None if stream is None else _Streamer(self.processor.tokenizer, stream),
        )
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    @torch.inference_mode()
    def features(self, image: ImageSource) -> Features:
        """Feature maps and visual tokens of one picture."""
        inputs = self.processor(images=[image]).to(self.model.device, self.model.dtype)
        vision = self.model.model.vision
        (size,) = inputs["image_sizes"].tolist()
        layout = vision.layout((size[0], size[1]))
        views = [
            inputs["pixel_values"][i : i + 1, :, :height, :width]
            for i, (height, width) in enumerate(layout.inputs)
        ]
        return Features(vision.features(views), vision(views).tokens[0], layout)

    def layout(self, image: ImageSource) -> TokenLayout:
        """The views and visual tokens that a picture will cost, without running the model."""
        picture = self.processor.image_processor.fetch_images(image)
        return self.processor.geometry.layout((picture.height, picture.width))


def _conversation(pictures: Sequence[ImageSource], question: str) -> list[dict[str, Any]]:
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if not pictures:
        raise ValueError("a question needs at least one picture")
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]


class _Streamer(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, stream: Stream) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._stream(text)
