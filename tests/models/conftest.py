"""Tiny assistants: every kind of vision, two language models, one small tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from stepwell.fuse.dual import EnhancementConfig
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import ProjectorConfig
from stepwell.fuse.windows import WindowConfig
from stepwell.models.anyres import AnyResConfig
from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.inf import InfConfig
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.models.pyramid import BranchConfig
from stepwell.models.pyramid_shared import PyramidSharedConfig
from stepwell.models.uhd import V1_WINDOWS, UhdV1Config, UhdV2Config
from stepwell.models.vision import VisionConfig
from stepwell.reader.tokenizer import build_reader_tokenizer

PLAIN = PlainConfig(encoder="vit_nano", size=64, framing="pad")
PIIP = PiipConfig(
    branches=(
        BranchConfig(encoder="vit_nano", size=64, interactions=((0, 0), (1, 1)), arguments={"depth": 2}),
        BranchConfig(
            encoder="vit_nano",
            size=128,
            interactions=((0, 0), (1, 1)),
            arguments={"dim": 32, "depth": 2, "num_heads": 2},
        ),
    ),
    interaction=InteractionConfig(num_heads=4),
    projector=ProjectorConfig(num_groups=8),
    framing="aspect",
)
UHD_V1 = UhdV1Config(encoder="vit_nano", size=64, max_slices=4, windows=replace(V1_WINDOWS, grid=(2, 2)))
UHD_V2 = UhdV2Config(encoder="vit_nano", size=64, max_slices=4, windows=WindowConfig(grid=(2, 2)))
INF = InfConfig(
    encoder="vit_nano", size=64, resolutions=(64,), max_crops=6, enhancement=EnhancementConfig(num_heads=2)
)
ANYRES = AnyResConfig(encoder="vit_nano", size=64, grids="(1x1),...,(2x2)")
PYRAMID_SHARED = PyramidSharedConfig(
    encoder="vit_nano", sizes=(32, 64), projector=ProjectorConfig(num_groups=8), framing="aspect"
)
LLAVA_HR = LlavaHrConfig(
    fast="vit_nano",
    slow="convnext_nano",
    size=128,
    fast_least=32,
    framing="aspect",
    slow_arguments={"strides": [4, 2, 2, 2]},
)
VISIONS = {
    "plain": PLAIN,
    "piip": PIIP,
    "uhd_v1": UHD_V1,
    "uhd_v2": UHD_V2,
    "inf": INF,
    "anyres": ANYRES,
    "pyramid_shared": PYRAMID_SHARED,
    "llava_hr": LLAVA_HR,
}

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
