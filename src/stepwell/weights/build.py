"""What a published checkpoint becomes: our model, its language model's configuration, its processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stepwell.folders import one_line
from stepwell.models.config import StepwellConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.perception import PyramidBackboneConfig, PyramidClassifierConfig, image_processor
from stepwell.models.processor import StepwellProcessor
from stepwell.models.published.published import Published
from stepwell.models.register import MODELS
from stepwell.models.with_head import padded_image_processor

__all__ = ["build_model", "text_config", "write_processor"]

# What transformers raises for fields that no configuration can have.
UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError)


def build_model(
    published: Published, fields: Mapping[str, Any], vocab_size: int | None = None
) -> PreTrainedModel:
    """Our model of this name on the meta device, where even 13 billion parameters cost no memory.

    fields, vocab_size: as for `text_config`, of an assistant.
    """
    config: PreTrainedConfig
    match published.settings:
        case DenseSettings() as settings:
            names = dict(enumerate(published.classes))
            kind = StepwellDetectorConfig if published.task == "detection" else StepwellSegmenterConfig
            config = kind(settings, published.head, published.images, id2label=names)
        case ClassifierSettings() as settings:
            config = PyramidClassifierConfig(pyramid=settings, num_labels=published.num_classes)
        case settings:
            language = text_config(published.text_config or {}, fields, vocab_size)
            config = StepwellConfig(
                vision_config=settings,
                text_config=language,
                image_token_id=language.vocab_size,  # the first that is no word
                template=published.template,
            )
    model = MODELS[config.model_type]
    config.architectures = [model.__name__]
    with torch.device("meta"):
        return model(config)


def text_config(
    published: Mapping[str, Any], fields: Mapping[str, Any], vocab_size: int | None = None
) -> PreTrainedConfig:
    """The configuration of the language model inside a checkpoint.

    fields: the config.json beside it, where those of the language model lie at the top or under text_config;
    `published` says what is not there, and the architecture where model_type names none of transformers'
    language models. vocab_size: of the embedding, where config.json does not say. Raises ValueError.
    """
    try:
        fields = fields.get("text_config") or fields
        model_type = fields.get("model_type")
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            model_type = published.get("model_type")
        known = {*AutoConfig.for_model(model_type).to_dict(), "rope_theta", "rope_scaling"}
        known -= {*PreTrainedConfig().to_dict(), "use_cache"}  # of the class, of the training
        values = dict(published) if model_type == published.get("model_type") else {}
        values |= {"vocab_size": vocab_size} if vocab_size else {}
        values |= {key: value for key, value in fields.items() if key in known}
        return AutoConfig.for_model(**values | {"model_type": model_type})
    except UNFIT as error:
        raise ValueError(f"config.json describes no language model: {one_line(error)}") from None


def write_processor(folder: Path, config: PreTrainedConfig, source: Path) -> list[str]:
    """What `from_pretrained` wants beside the weights but config.json. Returns notes for the report.

    The tokenizer in the folder `source` gets a token for an image's place, which goes into `config`; without
    a tokenizer only the image side is written. Raises ValueError for a tokenizer that cannot be read.
    """
    if isinstance(config, PyramidBackboneConfig | PyramidClassifierConfig):
        image_processor(config.settings).save_pretrained(folder)
        return []
    if isinstance(config, StepwellDetectorConfig | StepwellSegmenterConfig):
        padded_image_processor(config).save_pretrained(folder)
        return []
    assert isinstance(config, StepwellConfig)
    of_images = StepwellImageProcessor(vision_config=config.vision_config)
    if not any(source.glob("tokenizer*")):
        of_images.save_pretrained(folder)
        return ["no tokenizer beside the source: the model can be loaded, but asked nothing until it has one"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(error)
        if (source / "tokenizer.model").is_file():
            reason = "a tokenizer.model needs two packages: pip install sentencepiece protobuf"
        raise ValueError(f"the tokenizer in {source} cannot be read: {reason}") from None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    StepwellProcessor(of_images, tokenizer, template=config.template).save_pretrained(folder)
    return []
