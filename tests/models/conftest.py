"""Tiny assistants: every kind of vision, two language models, one small tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from visions import PIIP, VISIONS

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.processor import StepwellProcessor
from stepwell.models.vision import VisionConfig
from stepwell.reader.tokenizer import build_reader_tokenizer

Build = Callable[..., Assistant]


def text_config(family: str, vocab_size: int) -> PreTrainedConfig:
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**sizes)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_reader_tokenizer()


@pytest.fixture(scope="session")
def build(tokenizer: PreTrainedTokenizerFast) -> Build:
    """build(vision settings, language model family) -> a random Assistant whose gates are open."""

    def assistant_of(
        vision: VisionConfig = PIIP, family: str = "llama", template: str | None = "chatml_direct"
    ) -> Assistant:
        torch.manual_seed(0)
        config = StepwellConfig(
            vision,
            text_config(family, len(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            template=template,
        )
        model = StepwellForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "gate" in name or "adapters" in name:
                torch.nn.init.normal_(parameter, std=0.1 if "adapters" in name else 0.5)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        processor = StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template=template)
        return Assistant(model, processor)

    return assistant_of


@pytest.fixture(scope="session")
def assistant(build: Build) -> Assistant:
    return build()


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """draw(width, height, seed) -> a random image, coarse enough to survive resizing."""

    def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (4, 5, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BILINEAR)

    return drawn


@pytest.fixture(scope="session", params=list(VISIONS))
def vision(request: pytest.FixtureRequest) -> VisionConfig:
    return VISIONS[request.param]
