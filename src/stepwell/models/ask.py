"""A model and its processor as one noun: ask about images, or take their features.

The same `ask` serves Python, the command line, evaluation and servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import TextStreamer

from stepwell.images.open import ImageSource, open_image
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import refuse_other_settings
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import TokenLayout, VisionFeatures

__all__ = ["Assistant"]

Stream = Callable[[str], None]


class Assistant:
    """Answers questions about images.

    Images may be whatever `stepwell.open_image` takes; several belong in one list.
    """

    def __init__(self, model: StepwellForConditionalGeneration, processor: StepwellProcessor) -> None:
        """Raises ValueError naming the first setting in which the two differ."""
        refuse_other_settings(
            model.config,
            vision_config=processor.image_processor.vision_config,
            template=processor.template,
            image_token_id=processor.image_token_id,
        )
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
        """The answer to a question about an image, or about several; `stream` is called with text as it
        comes.

        Greedy decoding. Raises ValueError for an empty question and for images that cannot be read.
        """
        images = image if isinstance(image, (list, tuple)) else [cast(ImageSource, image)]
        return self.ask_many([(images, question)], max_new_tokens=max_new_tokens, stream=stream)[0]

    @torch.inference_mode()
    def ask_many(
        self,
        questions: Sequence[tuple[Sequence[ImageSource], str]],
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
    ) -> list[str]:
        """Answers to (images, question) pairs in one batch, each as it would be alone. `stream` takes one
        pair.
        """
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
    def features(self, image: ImageSource) -> VisionFeatures:
        """Feature maps and visual tokens of one image, from one pass."""
        inputs = self.processor(images=[image]).to(self.model.device, self.model.dtype)
        encoded: list[VisionFeatures] = self.model.model.encode_images(**inputs)
        return encoded[0]

    def layout(self, image: ImageSource) -> TokenLayout:
        """The views and visual tokens that an image will cost, without running the model."""
        opened = open_image(image)
        return self.processor.geometry.layout((opened.height, opened.width))


def _conversation(images: Sequence[ImageSource], question: str) -> list[dict[str, Any]]:
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if not images:
        raise ValueError("a question needs at least one image")
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]


class _Streamer(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, stream: Stream) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._stream(text)
