"""An assistant without transformers, whose import takes longer than an answer: a plain Llama, greedily.

The one exception to a library being better than our code, for the command that everybody types first.
weights/light.py tells which folders it may open.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stepwell.images.limits import DEFAULT_LIMITS
from stepwell.language.decoder import LlamaDecoder, decode_greedily, positions_of
from stepwell.language.light_tokenizer import LightTokenizer
from stepwell.language.splice import place_visual_tokens
from stepwell.models.engine import Each, Prompts
from stepwell.models.vision import VisionSystem
from stepwell.structures import Geometry, TokenLayout, VisionFeatures

__all__ = ["LightEngine", "LightModel"]


class LightModel(nn.Module):
    """The parameters of a StepwellForConditionalGeneration, by the same names."""

    def __init__(self, vision: VisionSystem, language_model: LlamaDecoder) -> None:
        super().__init__()
        settings = language_model.settings
        self.model = _Parts(vision, language_model)
        self.lm_head = nn.Linear(settings.hidden_size, settings.vocab_size, bias=False)


class _Parts(nn.Module):
    def __init__(self, vision: VisionSystem, language_model: LlamaDecoder) -> None:
        super().__init__()
        self.vision, self.language_model = vision, language_model


class LightEngine:
    """An Engine (models/engine.py). end: ids that end an answer; boxes_are_regions: as of
    StepwellProcessor.
    """

    def __init__(
        self,
        model: LightModel,
        tokenizer: LightTokenizer,
        *,
        chat_template: str,
        image_token_id: int,
        end: Sequence[int],
        boxes_are_regions: bool = False,
    ) -> None:
        self.vision, self.language_model = model.model.vision, model.model.language_model
        self.head = model.lm_head
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.image_token_id = image_token_id
        self.end = end
        self.boxes_are_regions = boxes_are_regions
        self.limits = DEFAULT_LIMITS
        self.max_positions: int | None = self.language_model.settings.max_position_embeddings

    @property
    def geometry(self) -> Geometry:
        return self.vision.geometry

    @property
    def networks(self) -> list[nn.Module]:
        return [self.vision, self.language_model, self.head]

    @property
    def words(self) -> Tensor:
        words: Tensor = self.language_model.embed_tokens.weight
        return words

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        return self.vision.encode([x.to(self.words.device, self.words.dtype) for x in inputs], layouts)

    def answer(self, prompts: Prompts, *, max_new_tokens: int, each: Each | None = None) -> Tensor:
        embeddings, is_text = self._embedded(prompts)
        return decode_greedily(
            self.language_model,
            self.head,
            embeddings,
            is_text,
            max_new_tokens=max_new_tokens,
            end=self.end,
            never=[self.image_token_id] if self.image_token_id < len(self.words) else [],
            pad=self.tokenizer.pad_token_id or 0,
            each=None if each is None else lambda tokens: each(int(tokens)),
        )

    def logits(self, prompts: Prompts, *, last: int) -> Tensor:
        embeddings, is_text = self._embedded(prompts)
        cache = self.language_model.new_cache(embeddings, embeddings.shape[1])
        hidden = self.language_model(embeddings, positions_of(is_text), is_text, cache)
        logits: Tensor = self.head(hidden[:, -last:])
        return logits

    def _embedded(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) with visual tokens in their places, and is_text (B, L), on its device."""
        device = self.words.device
        input_ids = prompts.input_ids.to(device)
        is_placeholder = input_ids == self.image_token_id  # an id that may lie past the vocabulary
        embeddings = self.language_model.embed_tokens(input_ids.masked_fill(is_placeholder, 0))
        placed = place_visual_tokens(input_ids, embeddings, prompts.visual_tokens, self.image_token_id)
        return placed, prompts.is_text.to(device)
