"""From a recipe's words to things: the model, the sources, the sizes, the optimiser of a stage.

Each is a plain function that a test can call; the loop itself is transformers' Trainer (run.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoTokenizer

from stepwell.data.conversations import Conversations
from stepwell.data.drawn import DrawnPages
from stepwell.data.mixture import Mixture
from stepwell.data.sample import Source
from stepwell.data.text_lines import TextLines
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.processor import StepwellProcessor
from stepwell.models.settings import PiipConfig, PlainConfig
from stepwell.train.groups import parameter_groups
from stepwell.train.recipe import ConversationData, DataSource, DrawnData, Model, Optimiser, Stage
from stepwell.train.start import start_looking
from stepwell.train.tokenizer import build_reader_tokenizer

__all__ = [
    "build_config",
    "build_model",
    "build_optimiser",
    "build_source",
    "build_sources",
    "embedding_of",
    "rate_at",
    "resized",
]


def build_model(recipe: Model) -> tuple[StepwellForConditionalGeneration, StepwellProcessor]:
    """A model with random weights and its processor, or those of the folder that the recipe starts from."""
    processor = _build_processor(recipe)
    if recipe.start is not None:
        model = StepwellForConditionalGeneration.from_pretrained(recipe.start, dtype=torch.float32)
        return model, processor
    model = StepwellForConditionalGeneration(_config(recipe, processor))
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    if recipe.start_looking:
        start_looking(model, processor.tokenizer)
    return model, processor


def build_config(recipe: Model) -> StepwellConfig:
    """The configuration of the model that a recipe trains."""
    if recipe.start is not None:
        config: StepwellConfig = StepwellConfig.from_pretrained(recipe.start)
        return config
    return _config(recipe, _build_processor(recipe))


def _config(recipe: Model, processor: StepwellProcessor) -> StepwellConfig:
    assert recipe.vision is not None
    assert recipe.text is not None
    tokenizer = processor.tokenizer
    token_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    return StepwellConfig(
        vision_config=recipe.vision,
        text_config=AutoConfig.for_model(**{"vocab_size": len(tokenizer), **token_ids, **recipe.text}),
        image_token_id=processor.image_token_id,
        template=recipe.template,
    )


def _build_processor(recipe: Model) -> StepwellProcessor:
    if recipe.start is not None:
        processor: StepwellProcessor = StepwellProcessor.from_pretrained(recipe.start)
        return processor
    assert recipe.vision is not None
    built_here = recipe.tokenizer == "reader"
    tokenizer = build_reader_tokenizer() if built_here else AutoTokenizer.from_pretrained(recipe.tokenizer)
    return StepwellProcessor(StepwellImageProcessor(recipe.vision), tokenizer, template=recipe.template)


def embedding_of(model: StepwellForConditionalGeneration) -> nn.Embedding:
    """The language model's embedding."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def resized(config: PlainConfig | PiipConfig, sizes: Sequence[int] | None) -> PlainConfig | PiipConfig:
    """The same system looking at views of other sides, one an encoder; None changes nothing."""
    if sizes is None:
        return config
    expected = 1 if isinstance(config, PlainConfig) else len(config.branches)
    if len(sizes) != expected:
        raise ValueError(f"sizes: the vision system has {expected} views, got {list(sizes)}")
    if isinstance(config, PlainConfig):
        return replace(config, size=sizes[0])
    branches = tuple(replace(branch, size=size) for branch, size in zip(config.branches, sizes, strict=True))
    return replace(config, branches=branches)


def build_source(data: DataSource) -> Source:
    """The source that a recipe's entry describes. Raises FileNotFoundError where a file is not there."""
    if isinstance(data, DrawnData):
        return DrawnPages(
            count=data.count,
            seed=data.seed,
            sides=data.sides,
            aspect=data.aspect,
            text=data.text,
            reads=data.reads,
            kind=data.page,
        )
    if isinstance(data, ConversationData):
        return Conversations(data.path, images=data.images)
    return TextLines(
        data.path,
        images=data.images,
        fields=data.fields,
        reads=data.reads,
        long_side=data.long_side,
        seed=data.seed,
    )


def build_sources(stage: Stage, *, seed: int) -> Mixture:
    """All samples of a stage, as many as its steps take."""
    length = stage.steps * stage.batch * stage.accumulate
    sources = [build_source(data) for data in stage.data]
    return Mixture(sources, [data.weight for data in stage.data], length=length, seed=seed)


def build_optimiser(model: nn.Module, recipe: Optimiser, *, steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW over the model's parameter groups; warm-up, plateau, linear decay to zero."""
    groups = parameter_groups(model, lr=recipe.lr, part_lrs=recipe.part_lrs, weight_decay=recipe.weight_decay)
    optimiser = AdamW(groups, betas=recipe.betas)
    return optimiser, LambdaLR(optimiser, lambda step: rate_at(step, recipe, steps))


def rate_at(step: int, recipe: Optimiser, steps: int) -> float:
    """Share of the learning rate at a step: up over warmup_steps, down over the last decay_share."""
    up = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    down = (steps - step) / max(1.0, recipe.decay_share * steps)
    return min(up, max(0.0, down))
