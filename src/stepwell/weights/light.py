"""Opens a folder of ours without transformers, where nothing in it says that an answer would be another.

Every field of every file is looked at. Whatever is not known to be of no matter sends the folder the way
through transformers, which also says what is wrong with a folder that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stepwell.flops.outlines import outlines
from stepwell.folders import SHIPPED, check_format, commit_of, find_folder
from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits
from stepwell.language.decoder import LlamaDecoder, plain_llama
from stepwell.language.light_tokenizer import LightTokenizer
from stepwell.language.messages import IMAGE
from stepwell.language.template import TEMPLATES
from stepwell.models.ask import Assistant
from stepwell.models.light import LightEngine, LightModel
from stepwell.models.systems import vision_settings
from stepwell.models.vision import settings_json
from stepwell.weights.placement import Precision, find_device, find_dtype

__all__ = ["load_light", "load_to_ask"]

_CONFIG = frozenset(
    {
        *("architectures", "dtype", "image_token_id", "model_type", "separators", "template", "text_config"),
        *("stepwell_format", "tie_word_embeddings", "transformers_version", "vision_config"),
    }
)
_PROCESSOR = frozenset({"image_processor", "processor_class", "separators", "template", "boxes_are_regions"})
_IMAGE_PROCESSOR = frozenset({"image_processor_type", "vision_config"})


def load_to_ask(
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: Precision | None = None,
    revision: str | None = None,
    limits: ImageLimits | None = None,
) -> Any:
    """What `stepwell.load` loads, without transformers where that gives the same answers."""
    folder = SHIPPED if model is None else find_folder(model)
    if folder is not None and revision is None:
        light = load_light(folder, device=find_device(device), dtype=find_dtype(dtype), limits=limits)
        if light is not None:
            light.commit = commit_of(folder)
            return light
    from stepwell.weights.load import load

    return load(model, device=device, dtype=dtype, revision=revision, limits=limits)


def load_light(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    limits: ImageLimits | None = None,
) -> Assistant | None:
    """As `stepwell.load` does, None where it has to be asked. dtype: None is the stored one."""
    try:
        config, processor, generation = (
            json.loads((folder / f"{name}.json").read_text("utf-8"))
            for name in ("config", "processor_config", "generation_config")
        )
        engine = _engine(folder, config, processor, generation, device, dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    if engine is None:
        return None
    engine.limits = limits or DEFAULT_LIMITS
    return Assistant.on(engine)


def _engine(
    folder: Path,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    generation: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
) -> LightEngine | None:
    check_format(config)
    settings, vision = plain_llama(config["text_config"]), vision_settings(config["vision_config"])
    tokenizer = LightTokenizer.read(folder)
    is_known = (
        config.keys() <= _CONFIG
        and processor.keys() <= _PROCESSOR
        and processor["image_processor"].keys() <= _IMAGE_PROCESSOR
        and not config.get("separators")
        and not processor.get("separators")
        and config["template"] in TEMPLATES
        and isinstance(generation["eos_token_id"], int | list)
    )
    if settings is None or tokenizer is None or not is_known:
        return None
    tied = config.get("tie_word_embeddings", settings.tie_word_embeddings)
    agrees = (
        tied == settings.tie_word_embeddings
        and processor["template"] == config["template"]
        and tokenizer.convert_tokens_to_ids(IMAGE) == config["image_token_id"]
        and settings_json(vision_settings(processor["image_processor"]["vision_config"]))
        == settings_json(vision)
    )
    if not agrees:
        return None
    weights = load_file(folder / "model.safetensors")
    if settings.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    with outlines():  # random weights of a large model would take minutes, and its memory twice
        model = LightModel(vision.build(settings.hidden_size), LlamaDecoder(settings))
    model.load_state_dict(weights, assign=True)
    if settings.tie_word_embeddings:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.to(device, dtype or getattr(torch, config["dtype"])).eval()
    end = generation["eos_token_id"]
    return LightEngine(
        model,
        tokenizer,
        chat_template=TEMPLATES[config["template"]].jinja,
        image_token_id=config["image_token_id"],
        end=end if isinstance(end, list) else [end],
        boxes_are_regions=bool(processor.get("boxes_are_regions")),
    )
