"""Any vision system and any causal language model: images and text in, text out.

The visual tokens of an image stand where its placeholder tokens stand (LLaVA, arXiv 2304.08485, section 4.1).
Classes are shaped as transformers' own, so that `generate`, pipelines, Trainer and PEFT take them as they
are. Letters: B batch, L text length, D the language model's width, P pixels of all inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from stepwell.language.labels import IGNORE
from stepwell.language.splice import place_visual_tokens
from stepwell.models.config import StepwellConfig
from stepwell.models.generation import GenerationMixinWithImages
from stepwell.models.keywords import names_of, refuse_unread
from stepwell.models.saving import SharedWeights
from stepwell.models.starting_values import keep_built, reset, start_missing
from stepwell.models.vision import NEVER_CUT, fitted
from stepwell.ops.pack import unpack
from stepwell.structures import NO_REGION, TokenLayout, VisionFeatures

__all__ = [
    "StepwellForConditionalGeneration",
    "StepwellModel",
    "StepwellModelOutput",
    "StepwellOutput",
    "StepwellPreTrainedModel",
]

# What the installed transformers calls a cache: "past_key_values" until 5.23, "cache" since. We take both.
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("past_key_values", "cache"))


@dataclass
class StepwellModelOutput(BaseModelOutputWithPast):
    """Fields of transformers' base model outputs; `image_hidden_states` (all visual tokens, D)."""

    image_hidden_states: Tensor | None = None


@dataclass
class StepwellOutput(CausalLMOutputWithPast):
    """Fields of transformers' causal language model outputs, and those of StepwellModel's."""

    image_hidden_states: Tensor | None = None
    last_hidden_state: Tensor | None = None


class StepwellPreTrainedModel(SharedWeights, PreTrainedModel):
    config_class = StepwellConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = NEVER_CUT
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # images of a batch are grouped by size in Python
    _skip_keys_device_placement = ("past_key_values", "cache")

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, StepwellModel):
                start_missing(module.vision)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Of what is not in a vision system; language models bring their own rule."""
        reset(module)


class StepwellModel(StepwellPreTrainedModel):
    """`vision` (a VisionSystem) and `language_model`, without the language model's head."""

    def __init__(self, config: StepwellConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        self.vision = config.vision.build(_embedding_dim(self.language_model))
        keep_built(self.vision)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def layouts(self, image_sizes: Tensor, image_regions: Tensor | None = None) -> list[TokenLayout]:
        """image_sizes (images, 2): height and width of the upright sources. image_regions (images, 4): what
        is looked at closely, in pixels, zeros for nothing.
        """
        sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
        regions = [NO_REGION] * len(sizes) if image_regions is None else map(tuple, image_regions.tolist())
        return [
            self.vision.geometry.layout_of(size, None if region == NO_REGION else region)
            for size, region in zip(sizes, regions, strict=True)
        ]

    def encode_images(
        self, pixel_values: Tensor, image_sizes: Tensor, image_regions: Tensor | None = None
    ) -> list[VisionFeatures]:
        """Visual tokens and feature maps of each image. Arguments as for `get_image_features`."""
        return self.vision.encode(*self._unpacked(pixel_values, image_sizes, image_regions))

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor, image_regions: Tensor | None = None
    ) -> list[Tensor]:
        """Visual tokens of each image: a list of (N, D), N as `layout(size).num_visual` says.

        pixel_values (P, 3): the inputs of all images in order, a row a pixel. image_sizes, image_regions: as
        of `layouts`. Raises ValueError where the pixels are not as many as the sizes say.
        """
        visual_tokens: list[Tensor] = self.vision(*self._unpacked(pixel_values, image_sizes, image_regions))
        return visual_tokens

    def embed(self, input_ids: Tensor, visual_tokens: Tensor | None, *, is_checked: bool = True) -> Tensor:
        """Embeddings (B, L, D) of ids (B, L), visual tokens (N, D) in place of the placeholders.

        Raises ValueError as `place_visual_tokens` does. is_checked: False is for ids that hold none.
        """
        is_placeholder = input_ids == self.config.image_token_id  # an id that may lie past the vocabulary
        embeddings: Tensor = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        if not is_checked:
            return embeddings
        return place_visual_tokens(input_ids, embeddings, visual_tokens, self.config.image_token_id)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask of who looks at whom (B, 1, L, L) as eager attention wants it, which would add True as 1."""
        if mask is None or mask.ndim != 4 or mask.dtype != torch.bool:
            return mask
        if self.language_model.config._attn_implementation != "eager":
            return mask
        dtype: torch.dtype = next(self.language_model.parameters()).dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _unpacked(
        self, pixel_values: Tensor, image_sizes: Tensor, image_regions: Tensor | None
    ) -> tuple[list[Tensor], list[TokenLayout]]:
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel cuts pixel_values, whose rows are pixels and not samples, into equal parts; "
                "start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        layouts = self.layouts(image_sizes, image_regions)
        pixel_values = fitted(pixel_values, self.vision)
        return unpack(pixel_values, [size for layout in layouts for size in layout.inputs]), layouts

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_regions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> StepwellModelOutput:
        """input_ids (B, L) with expanded placeholders, or inputs_embeds (B, L, D) whose images are
        already in place.

        Raises ValueError, with both counts, where placeholders and visual tokens differ in number.
        """
        refuse_unread(self, self.language_model, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        image_features = None
        if input_ids is not None:
            if pixel_values is not None:
                if image_sizes is None:
                    raise ValueError(
                        "pixel_values come with image_sizes; pass on all that the processor returns"
                    )
                features = self.get_image_features(pixel_values, image_sizes, image_regions)
                image_features = torch.cat(features) if features else None
            is_checked = image_features is not None or _may_hold_placeholders(input_ids, cache)
            inputs_embeds = self.embed(input_ids, image_features, is_checked=is_checked)
        elif pixel_values is not None:
            raise ValueError("pixel_values belong with input_ids; inputs_embeds already hold their images")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._mask(attention_mask),
            position_ids=position_ids,
            **{**kwargs, CACHE: cache, "return_dict": True},
        )
        return StepwellModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
        )


def _may_hold_placeholders(input_ids: Tensor, cache: Cache | None) -> bool:
    """Decoding steps, one token behind a cache, are not looked at; a compiled graph cannot look."""
    if torch.compiler.is_compiling():
        return False
    return cache is None or input_ids.shape[1] > 1


def _embedding_dim(language_model: PreTrainedModel) -> int:
    """Width of the word embeddings, which a few language models widen behind them."""
    return int(language_model.get_input_embeddings().weight.shape[1])


class StepwellForConditionalGeneration(StepwellPreTrainedModel, GenerationMixinWithImages):
    """A StepwellModel with the language model's head.

    `from_pretrained` reads this class's own format; `AutoModelForImageTextToText` finds it once stepwell is
    imported.
    """

    def __init__(self, config: StepwellConfig) -> None:
        super().__init__(config)
        causal = AutoModelForCausalLM.from_config(config.text_config)
        self.model = StepwellModel(config, causal.base_model)
        self.lm_head = causal.get_output_embeddings()
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head:
            self.model.language_model._init_weights(module)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.lm_head)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @property
    def parts(self) -> dict[str, str]:
        """Names of parts, as recipes write them -> prefixes of parameters."""
        vision = {name: f"model.vision.{prefix}" for name, prefix in self.config.vision.parts.items()}
        language = {"language": "model.language_model", "language.lm_head": "lm_head"}
        return {"vision": "model.vision", **vision, **language}

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor, image_regions: Tensor | None = None
    ) -> list[Tensor]:
        return self.model.get_image_features(pixel_values, image_sizes, image_regions)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_regions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> StepwellOutput:
        """As StepwellModel's, with logits (B, L, vocabulary) and, given labels (B, L), the loss.

        Labels of -100 and placeholders are no targets. num_items_in_batch, by which a loss is divided, is
        taken to count placeholders as this batch does. Further keywords are the language model's, or those of
        `loss_function`; others raise TypeError.
        """
        of_loss = {name: kwargs.pop(name) for name in names_of(self.loss_function) & kwargs.keys()}
        refuse_unread(self, self.model.language_model, kwargs)
        outputs: StepwellModelOutput = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_regions=image_regions,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _finish_logits(self.lm_head(hidden[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, **of_loss)
        return StepwellOutput(loss=loss, logits=logits, **outputs)

    def _loss(self, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        image_token_id = self.config.image_token_id
        if (shifted := options.get("shift_labels")) is not None:
            options["shift_labels"] = shifted.masked_fill(shifted == image_token_id, IGNORE)
        if (items := options.get("num_items_in_batch")) is not None:
            counted = labels[:, 1:] if shifted is None else shifted
            learned = counted[counted != image_token_id]
            share = (learned != IGNORE).sum().clamp(min=1) / (counted != IGNORE).sum().clamp(min=1)
            options["num_items_in_batch"] = items * share
        labels = labels.masked_fill(labels == image_token_id, IGNORE)
        loss: Tensor = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **options
        )
        if self.training and torch.is_grad_enabled() and not loss.requires_grad:
            # Where vision alone learns, a batch without an image has nothing for it; it must not end the run.
            learning = (parameter for parameter in self.model.vision.parameters() if parameter.requires_grad)
            loss = sum((parameter.flatten()[0] * 0.0 for parameter in learning), loss)
        return loss


def _finish_logits(logits: Tensor, config: Any) -> Tensor:
    """What some language models do behind their head (Cohere, Granite: a scale; Gemma 2: a soft cap)."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
