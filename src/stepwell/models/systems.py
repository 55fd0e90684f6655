"""SYSTEMS: the vision systems by the `kind` of their settings. A new system adds its line here."""

from __future__ import annotations

from typing import Any

from stepwell.models.anyres import AnyResConfig
from stepwell.models.fewer_tokens import FewerTokensConfig
from stepwell.models.inf import InfConfig
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.placed import PlacedConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid_shared import PyramidSharedConfig
from stepwell.models.uhd import UhdV1Config, UhdV2Config
from stepwell.models.vision import VisionConfig, validated

__all__ = ["SYSTEMS", "vision_settings"]

SYSTEMS: dict[str, type[VisionConfig]] = {
    "plain": PlainConfig,
    "piip": PiipConfig,
    "pyramid_shared": PyramidSharedConfig,
    "anyres": AnyResConfig,
    "llava_hr": LlavaHrConfig,
    "uhd_v1": UhdV1Config,
    "uhd_v2": UhdV2Config,
    "inf": InfConfig,
    "placed": PlacedConfig,
    "fewer_tokens": FewerTokensConfig,
}


def vision_settings(settings: dict[str, Any] | VisionConfig) -> VisionConfig:
    """A mapping with a `kind` -> the settings of that system. Raises ValueError naming the wrong field."""
    kind = settings.get("kind") if isinstance(settings, dict) else settings.kind
    if kind not in SYSTEMS:
        raise ValueError(f"vision_config: kind {kind!r} is none of {', '.join(map(repr, SYSTEMS))}")
    config: VisionConfig = validated(SYSTEMS[kind], settings, "vision_config")
    return config
