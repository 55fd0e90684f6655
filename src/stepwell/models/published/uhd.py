"""LLaVA-UHD v2, arXiv 2412.13871, and its first version: the releases, and the paper where it differs.

The releases differ in what their tensors do not tell: which levels are read, whether the slices' tokens make
one map, and separators that are Llama's token ids in front of any language model. Their slices are at most 7
in training, and 9 in the evaluations that the printed scores are of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepwell.fuse.upsample import KernelConfig, UpsamplerConfig
from stepwell.fuse.windows import WindowConfig
from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.llava import LANGUAGE_MODEL
from stepwell.keys.uhd import resampler_rules, upsampler_checkpoint_rules, vision_rules, window_rules
from stepwell.models.published.published import QWEN2_7B, VICUNA_7B, VICUNA_13B, Published, clip_rules
from stepwell.models.uhd import UhdV1Config, UhdV2Config

__all__ = ["PAPER", "UHD"]

REPOSITORY = "YipengZhang/LLaVA-UHD-v2"
LLAMA_IDS: dict[str, Any] = {"newline": (13,), "comma": (29892,)}

PAPER = UhdV2Config(
    max_slices=6,
    upsampler=UpsamplerConfig(
        kernel=KernelConfig(distance="pixels", similarity="sigma", normalise="count", correction=False),
        corrections="none",
    ),
    windows=WindowConfig(query_sets=1, bins="paper", level_code="behind", window_code=True),
    before_overview="comma",
)
"""The model of the paper, where that says something else than the code does."""


def _vision_rules(settings: UhdV1Config) -> list[Rule]:
    tower = clip_rules(settings.encoder, settings.arguments)
    if isinstance(settings, UhdV2Config):
        projector = window_rules(settings.levels, settings.windows.query_sets)
        return vision_rules(tower, projector, num_stages=settings.levels[-1])
    return vision_rules(tower, resampler_rules(), num_stages=None)


def _chat_rules(settings: UhdV1Config) -> list[Rule]:
    return [Prefix("", "model.vision.", _vision_rules(settings)), *LANGUAGE_MODEL]


def _upsampler_rules(settings: UhdV2Config) -> list[Rule]:
    return [Prefix("", "upsampler.", upsampler_checkpoint_rules(settings.levels[-1]))]


def _releases() -> Iterator[Published]:
    organised = UhdV2Config(**LLAMA_IDS)
    apart = UhdV2Config(levels=(0, 2), organised=False, **LLAMA_IDS)
    for name, release, settings, text_config, template in (
        ("uhd_v2_vicuna_7b", REPOSITORY, organised, VICUNA_7B, "vicuna_v1"),
        ("uhd_v2_vicuna_13b", f"{REPOSITORY}-Vicuna-13B", apart, VICUNA_13B, "vicuna_v1"),
        ("uhd_v2_qwen2_7b", f"{REPOSITORY}-Qwen2.0-7B", apart, QWEN2_7B, "qwen"),
        (
            "uhd_v1_vicuna_13b",
            "guozonghao96/llava-uhd-144-13b",
            UhdV1Config(**LLAMA_IDS),
            VICUNA_13B,
            "vicuna_v1",
        ),
    ):
        yield Published(
            name=name,
            task="chat",
            settings=settings,
            rules=_chat_rules,
            text_config=text_config,
            template=template,
            repository=release,
        )
    yield Published(
        name="uhd_v2_projector_vicuna_7b",
        task="part",
        settings=organised,
        rules=_vision_rules,
        parts=("projector", "vision.upsampler"),
        text_config=VICUNA_7B,
        repository=REPOSITORY,
        file="mm_projector.bin",
    )
    yield Published(
        name="uhd_v2_upsampler_clip_l",
        task="part",
        settings=organised,
        rules=_upsampler_rules,
        parts=("vision.upsampler",),
        text_config=VICUNA_7B,
        repository=REPOSITORY,
        file="clip-large-vdim.ckpt",
    )
    yield Published(
        name="uhd_v2_paper",
        task="chat",
        settings=PAPER,
        rules=_chat_rules,
        text_config=VICUNA_7B,
        template="vicuna_v1",
        quirk="the model as the paper says; the released code builds another",
    )


UHD: tuple[Published, ...] = (*_releases(),)
