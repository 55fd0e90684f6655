"""What `generate` has to know of images: which are whose, and that their placeholders are no words.

A converted release has the id of its placeholder past the vocabulary, where what looks scores up by the ids
of a prompt finds none. Letters: B rows, L tokens, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from stepwell.structures import TokenLayout

__all__ = ["GenerationMixinWithImages"]

LOOK_SCORES_UP = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
"""Of transformers' own, those that look up scores by the ids of a prompt."""


class GenerationMixinWithImages(GenerationMixin):
    """transformers' `generate` for a model whose `config.image_token_id` stands for visual tokens.

    A placeholder is never an answer, and no penalty of a repeated word sees one. Logits processors of others
    read a padding token in place of a placeholder past the vocabulary.
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_regions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        ids = inputs.get("input_ids")
        is_whole = ids is not None and ids.shape[1] == input_ids.shape[1]  # of it nothing is cached
        if is_first_iteration or is_whole:
            inputs |= {"pixel_values": pixel_values, "image_sizes": image_sizes}
            inputs["image_regions"] = image_regions
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and samples repeat rows of text; each copy needs all images of its row, in the row's
        order."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        image_sizes = model_kwargs.pop("image_sizes", None)
        image_regions = model_kwargs.pop("image_regions", None)
        if expand_size > 1 and input_ids is not None and image_sizes is not None and len(image_sizes):
            layouts = self.model.layouts(image_sizes, image_regions)
            counts = self._images_per_row(input_ids, layouts)
            pixels = iter(pixel_values.split([layout.num_pixels for layout in layouts]))
            rows = [torch.cat([next(pixels) for _ in range(count)]) for count in counts if count]
            pixel_values = torch.cat([row for row in rows for _ in range(expand_size)])
            image_sizes = _repeated(image_sizes, counts, expand_size)
            if image_regions is not None:
                image_regions = _repeated(image_regions, counts, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes, "image_regions": image_regions}
        return input_ids, {**model_kwargs, **images}

    def _images_per_row(self, input_ids: Tensor, layouts: list[TokenLayout]) -> list[int]:
        """How many of the images in order belong to each row, by the placeholders that it holds."""
        waiting = [layout.num_visual for layout in layouts]
        counts = []
        for placeholders in (input_ids == self.config.image_token_id).sum(1).tolist():
            count = len(waiting)
            while placeholders > 0 and waiting:
                placeholders -= waiting.pop(0)
            counts.append(count - len(waiting))
        if waiting:
            raise ValueError(f"{len(layouts)} images were given, but the text has room for {sum(counts)}")
        return counts

    def _get_logits_processor(
        self, generation_config: Any, *arguments: Any, device: Any = None, **options: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *arguments, device=device, **options)
        image_token_id = self.config.image_token_id
        if image_token_id >= self.config.text_config.vocab_size:
            padding = generation_config._pad_token_tensor
            processors = [_fitted(processor, image_token_id, padding) for processor in processors]
        return LogitsProcessorList([SuppressTokensLogitsProcessor([image_token_id], device), *processors])

    def _get_candidate_generator(self, *arguments: Any, **options: Any) -> Any:
        generator = super()._get_candidate_generator(*arguments, **options)
        if isinstance(generator, PromptLookupCandidateGenerator):  # it asks which ids are suppressed
            generator.vocab_size = max(generator.vocab_size, self.config.image_token_id + 1)
        return generator


def _repeated(values: Tensor, counts: list[int], times: int) -> Tensor:
    """Rows of values, of which each row of text has so many: those of a row again and again, in its order."""
    return torch.cat([row for row in values.split(counts) for _ in range(times)])


def _fitted(processor: LogitsProcessor, image_token_id: int, padding: Tensor | None) -> LogitsProcessor:
    if isinstance(processor, LOOK_SCORES_UP):
        return _Widened(processor, image_token_id + 1)
    if type(processor).__module__.startswith("transformers.") or padding is None:
        return processor
    return _Padded(processor, image_token_id, padding)


class _Widened(LogitsProcessor):
    """Scores (B, V) with columns up to `width` that nothing can choose, for as long as they are processed."""

    def __init__(self, processor: LogitsProcessor, width: int) -> None:
        self.processor, self.width = processor, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = scores.shape[-1]
        wide = F.pad(scores, (0, max(0, self.width - words)), value=-torch.inf)
        processed: Tensor = self.processor(input_ids, wide)
        return processed[..., :words]


class _Padded(LogitsProcessor):
    """Ids (B, L) with padding in place of `image_token_id`."""

    def __init__(self, processor: LogitsProcessor, image_token_id: int, padding: Tensor) -> None:
        self.processor, self.image_token_id, self.padding = processor, image_token_id, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = torch.where(input_ids == self.image_token_id, self.padding.to(input_ids), input_ids)
        processed: Tensor = self.processor(words, scores)
        return processed
