"""A tiny assistant on disk, and images to ask it about."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.piip import PiipConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.models.pyramid import BranchConfig
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.weights.load import load

LAYERS = ((0, 0), (1, 1))
VISION = PiipConfig(
    branches=(
        BranchConfig(encoder="vit_nano", size=32, interactions=LAYERS, arguments={"depth": 2}),
        BranchConfig(encoder="vit_nano", size=64, interactions=LAYERS, arguments={"depth": 2}),
    ),
    framing="aspect",
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return saved(VISION, tmp_path_factory.mktemp("models") / "tiny")


def saved(vision, folder):
    """Random weights: what it answers is nonsense, and always the same."""
    torch.manual_seed(0)
    tokenizer = build_reader_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    config = StepwellConfig(
        vision,
        text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        template="chatml_direct",
    )
    model = StepwellForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template="chatml_direct").save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def save():
    return saved


@pytest.fixture(scope="session")
def assistant(model_folder) -> Assistant:
    return load(model_folder, device="cpu")


@pytest.fixture
def folder(tmp_path):
    """Three images: 0.png to 2.png."""
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(pixels.numpy()).resize((60 + 10 * i, 40), Image.Resampling.BILINEAR)
        image.save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def write(folder):
    """write(rows, as they are) -> a file of them, a line each."""

    def written(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("\n".join(lines), "utf-8")
        return folder / name

    return written
