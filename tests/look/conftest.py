"""Tiny assistants and perception models to look into, and pictures."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from systems_to_see import SYSTEMS, Build, Built, Draw, Lighten
from transformers import LlamaConfig, PreTrainedTokenizerFast

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.processor import StepwellProcessor
from stepwell.models.vision import VisionConfig
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.weights.light import load_light


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_reader_tokenizer()


@pytest.fixture(scope="session")
def build(tokenizer: PreTrainedTokenizerFast) -> Build:
    """A random assistant of a vision system, gates open, two heads of the language model to one of keys."""

    def assistant_of(vision: VisionConfig) -> Assistant:
        torch.manual_seed(0)
        language = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.5,  # so that attention is not uniform
        )
        config = StepwellConfig(
            vision,
            language,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            template="chatml_direct",
        )
        model = StepwellForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "gate" in name:
                torch.nn.init.normal_(parameter, std=0.5)
            if "offsets.weight" in name or "weights.weight" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        processor = StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template="chatml_direct")
        return Assistant(model, processor)

    return assistant_of


@pytest.fixture(scope="session")
def built(build: Build) -> Built:
    """The assistant of a kind of vision, the same at every call: for tests that leave it as it is."""
    return cache(lambda kind: build(SYSTEMS[kind]))


@pytest.fixture
def lightened(tmp_path: Path) -> Lighten:
    """The same assistant on the engine without transformers."""

    def light_of(assistant: Assistant) -> Assistant:
        assistant.model.save_pretrained(tmp_path)
        assistant.processor.save_pretrained(tmp_path)
        light = load_light(tmp_path, device=torch.device("cpu"))
        assert light is not None
        return light

    return light_of


@pytest.fixture(scope="session")
def draw() -> Draw:
    """draw(width, height, seed) -> a random picture, coarse enough to survive resizing."""

    def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (4, 5, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BILINEAR)

    return drawn
