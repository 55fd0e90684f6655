"""What an Assistant stands on: a vision system and a language model that answer, by transformers or without.

Letters: B prompts, L tokens of the longest, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol

from torch import Tensor

from stepwell.structures import Geometry, TokenLayout, VisionFeatures

__all__ = ["Engine", "TransformersEngine"]


class Engine(Protocol):
    """tokenizer: transformers', or one with as many of its methods as asking needs. max_positions: tokens
    that the language model was made for, prompt and answer together; None where it does not say.
    """

    tokenizer: Any
    image_token_id: int
    max_positions: int | None

    @property
    def geometry(self) -> Geometry:
        """Of the vision system."""

    @property
    def chat_template(self) -> str:
        """In Jinja."""

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        """Arguments as for VisionSystem.encode, on any device and in any precision."""

    def answer(
        self,
        input_ids: Tensor,
        is_text: Tensor,
        visual_tokens: Tensor,
        *,
        max_new_tokens: int,
        each: Callable[[list[int]], object],
    ) -> Tensor:
        """input_ids and is_text (B, L), padded on the left -> ids (B, n), greedily, settings of a folder's
        generation left aside. visual_tokens stand where the placeholders are; `each` is called with every
        column of ids.
        """


class TransformersEngine:
    """Any language model of transformers, by its `generate`."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Raises ValueError naming the first setting in which the two differ."""
        from stepwell.models.config import refuse_other_settings

        refuse_other_settings(
            model.config,
            vision_config=processor.image_processor.vision_config,
            template=processor.template,
            image_token_id=processor.image_token_id,
        )
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.image_token_id
        self.max_positions = getattr(model.config.text_config, "max_position_embeddings", None)

    @property
    def geometry(self) -> Geometry:
        return self.processor.geometry  # type: ignore[no-any-return]

    @property
    def chat_template(self) -> str:
        return self.processor.jinja()  # type: ignore[no-any-return]

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        moved = [x.to(self.model.device, self.model.dtype) for x in inputs]
        features: list[VisionFeatures] = self.model.model.vision.encode(moved, layouts)
        return features

    def answer(
        self,
        input_ids: Tensor,
        is_text: Tensor,
        visual_tokens: Tensor,
        *,
        max_new_tokens: int,
        each: Callable[[list[int]], object],
    ) -> Tensor:
        from transformers import GenerationConfig

        model, kept = copy(self.model), self.model.generation_config  # same weights, settings of its own
        model.generation_config = GenerationConfig(
            **{name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        input_ids, is_text = input_ids.to(model.device), is_text.to(model.device)
        answers: Tensor = model.generate(
            inputs_embeds=model.model.embed(input_ids, visual_tokens),
            attention_mask=is_text.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[self.image_token_id],
            streamer=_Streamer(each) if len(input_ids) == 1 else None,
        )
        return answers


class _Streamer:
    """What `generate` calls: first with the prompt, then with every token."""

    def __init__(self, each: Callable[[list[int]], object]) -> None:
        self.each, self.is_prompt = each, True

    def put(self, ids: Tensor) -> None:
        if not self.is_prompt:
            self.each(ids.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        pass
