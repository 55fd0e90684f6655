"""A tiny assistant of random weights, whose answers run to their end, and its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.plain import PlainConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.reader.tokenizer import build_reader_tokenizer

Draw = Callable[[int, int, int], Image.Image]


@pytest.fixture(scope="session")
def assistant() -> Assistant:
    torch.manual_seed(0)
    tokenizer = build_reader_tokenizer()
    vision = PlainConfig(encoder="vit_nano", size=64, framing="aspect")
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    config = StepwellConfig(
        vision,
        language,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        template="chatml_direct",
    )
    model = StepwellForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # each prompt has an answer of its own
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template="chatml_direct")
    return Assistant(model, processor)


@pytest.fixture(scope="session")
def folder(assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assistant")
    assistant.model.save_pretrained(folder)
    assistant.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def draw() -> Draw:
    """draw(width, height, seed) -> a random image."""

    def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (4, 5, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BILINEAR)

    return drawn
