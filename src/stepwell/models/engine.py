"""What an Assistant stands on: a vision system and a language model that answer, by transformers or without.

Letters: B prompts, L tokens of the longest, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from math import inf
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stepwell.images.limits import ImageLimits
from stepwell.language.labels import label_tokens, tokens_of_image
from stepwell.language.messages import Message
from stepwell.language.prompt import render
from stepwell.models.vision import VisionSystem
from stepwell.structures import Geometry, TokenLayout, VisionFeatures

__all__ = [
    "Each",
    "Engine",
    "Prompts",
    "TransformersEngine",
    "device_of",
    "padded",
    "prompt_ids",
    "tokens_left",
]


Each = Callable[[int], object]


class Prompts(NamedTuple):
    """A batch of prompts, padded on the left, and the visual tokens that stand where its placeholders are."""

    input_ids: Tensor  # (B, L)
    is_text: Tensor  # (B, L), False for padding
    visual_tokens: Tensor  # (N, D), in reading order


class Engine(Protocol):
    """tokenizer: transformers', or one with as many of its methods as asking needs. max_positions: tokens
    that the language model was made for, prompt and answer together; None where it does not say.
    boxes_are_regions: as of StepwellProcessor.
    """

    tokenizer: Any
    image_token_id: int
    max_positions: int | None
    boxes_are_regions: bool

    @property
    def geometry(self) -> Geometry:
        """Of the vision system."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """What holds the weights."""

    @property
    def vision(self) -> VisionSystem:
        """The vision system."""

    @property
    def words(self) -> Tensor:
        """Embeddings (vocabulary, D) of the language model's tokens."""

    @property
    def limits(self) -> ImageLimits:
        """Of the image files that are asked about."""

    @property
    def chat_template(self) -> str:
        """In Jinja."""

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        """Arguments as for VisionSystem.encode, on any device and in any precision."""

    def answer(self, prompts: Prompts, *, max_new_tokens: int, each: Each | None = None) -> Tensor:
        """Prompts -> ids (B, n), greedily, settings of a folder's generation left aside. `each` is called
        with every token of the one answer.
        """

    def logits(self, prompts: Prompts, *, last: int) -> Tensor:
        """Of prompts that hold their answers, in one pass: (B, last, vocabulary), at the last positions."""


def prompt_ids(engine: Engine, messages: Sequence[Message], layouts: Sequence[TokenLayout]) -> list[int]:
    """Of messages that are to be answered; layouts: of their images, in order. Raises ValueError as `render`
    does.
    """
    prompt = render(messages, engine.chat_template, engine.tokenizer, add_generation_prompt=True)
    images = [tokens_of_image(layout, engine.tokenizer, engine.image_token_id) for layout in layouts]
    return label_tokens(prompt, engine.tokenizer, images).input_ids


def padded(engine: Engine, rows: Sequence[Sequence[int]], visual_tokens: Tensor) -> Prompts:
    """Ids of prompts, and the visual tokens of all their images in order."""
    length, filler = max(map(len, rows)), engine.tokenizer.pad_token_id or 0
    padding = [length - len(row) for row in rows]
    return Prompts(
        torch.tensor([[filler] * n + [*row] for n, row in zip(padding, rows, strict=True)]),
        torch.tensor([[False] * n + [True] * len(row) for n, row in zip(padding, rows, strict=True)]),
        visual_tokens,
    )


def tokens_left(engine: Engine, length: int) -> float:
    """How many tokens may follow a prompt of so many; inf where the language model does not say. Raises
    ValueError where none may.
    """
    most = engine.max_positions
    if most is None:
        return inf
    if length >= most:
        raise ValueError(
            f"the prompt with its images takes {length} tokens, and the language model was made for {most}; "
            "show smaller or fewer images, or say less"
        )
    return most - length


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
        self.boxes_are_regions: bool = processor.boxes_are_regions
        self.max_positions = getattr(model.config.text_config, "max_position_embeddings", None)

    @property
    def geometry(self) -> Geometry:
        return self.processor.geometry  # type: ignore[no-any-return]

    @property
    def networks(self) -> list[nn.Module]:
        return [self.model]

    @property
    def vision(self) -> VisionSystem:
        return self.model.model.vision  # type: ignore[no-any-return]

    @property
    def words(self) -> Tensor:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def limits(self) -> ImageLimits:
        return self.processor.image_processor.limits  # type: ignore[no-any-return]

    @property
    def chat_template(self) -> str:
        return self.processor.jinja()  # type: ignore[no-any-return]

    def encode(
        self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout], *, vision: VisionSystem | None = None
    ) -> list[VisionFeatures]:
        """vision: another than the model's own, on its device."""
        moved = [x.to(device_of(self.model), self.model.dtype) for x in inputs]
        return (self.vision if vision is None else vision).encode(moved, layouts)

    def answer(self, prompts: Prompts, *, max_new_tokens: int, each: Each | None = None) -> Tensor:
        streamer = None if each is None else _Streamer(each)
        return self.generate(prompts, max_new_tokens=max_new_tokens, streamer=streamer)

    def logits(self, prompts: Prompts, *, last: int) -> Tensor:
        logits: Tensor = self.model(
            **self._embedded(prompts), logits_to_keep=last, use_cache=False, return_dict=True
        ).logits
        return logits

    def _embedded(self, prompts: Prompts) -> dict[str, Tensor]:
        device = device_of(self.model)
        return {
            "inputs_embeds": self.model.model.embed(prompts.input_ids.to(device), prompts.visual_tokens),
            "attention_mask": prompts.is_text.long().to(device),
        }

    def generate(self, prompts: Prompts, **options: Any) -> Tensor:
        """As `answer`, with options of transformers' `generate`."""
        from transformers import GenerationConfig

        model, kept = copy(self.model), self.model.generation_config  # same weights, settings of its own
        model.generation_config = GenerationConfig(
            **{name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        answers: Tensor = model.generate(**self._embedded(prompts), do_sample=False, **options)
        return answers


def device_of(model: Any) -> Any:
    """Where a model runs: weights that accelerate has offloaded lie elsewhere, and its hooks know."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), model.device)


class _Streamer:
    """What `generate` calls: first with the prompt, then with every token."""

    def __init__(self, each: Each) -> None:
        self.each, self.is_prompt = each, True

    def put(self, ids: Tensor) -> None:
        if not self.is_prompt:
            self.each(int(ids))
        self.is_prompt = False

    def end(self) -> None:
        pass
