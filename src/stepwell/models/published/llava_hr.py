"""LLaVA-HR, arXiv 2403.03003: the release with CLIP-L and ConvNeXt-L.

The names are those that its official code gives its modules; the released files have not been seen here.
"""

from __future__ import annotations

from stepwell.encoders.catalogue import encoder_arguments
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.llava import LANGUAGE_MODEL
from stepwell.keys.llava_hr import vision_rules
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.published.published import VICUNA_7B, Published

__all__ = ["LLAVA_HR"]


def _chat_rules(settings: LlavaHrConfig) -> list[Rule]:
    fast = backbone_rules("clip", class_slot=True)
    depths = encoder_arguments(settings.slow, settings.slow_arguments)["depths"]
    slow = backbone_rules("convnext_timm", depths=depths)
    return [Prefix("", "model.vision.", vision_rules(fast, slow, settings.adapters)), *LANGUAGE_MODEL]


LLAVA_HR: tuple[Published, ...] = (
    Published(
        name="llava_hr_7b_1024",
        task="chat",
        settings=LlavaHrConfig(),
        rules=_chat_rules,
        text_config=VICUNA_7B,
        template="vicuna_v1",
        repository="favor123/llava-hr-7b-sft-1024",
    ),
)
