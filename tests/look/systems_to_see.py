"""Every kind of vision, tiny, and what fixtures give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from PIL import Image

from stepwell.fuse.dual import EnhancementConfig
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import ProjectorConfig
from stepwell.fuse.windows import WindowConfig
from stepwell.models.anyres import AnyResConfig
from stepwell.models.ask import Assistant
from stepwell.models.fewer_tokens import FewerTokensConfig
from stepwell.models.inf import InfConfig
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.placed import PlacedConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.pyramid_shared import PyramidSharedConfig
from stepwell.models.uhd import V1_WINDOWS, UhdV1Config, UhdV2Config
from stepwell.models.vision import VisionConfig, settings_json

Build = Callable[[VisionConfig], Assistant]
Built = Callable[[str], Assistant]
Lighten = Callable[[Assistant], Assistant]
Draw = Callable[..., Image.Image]

BRANCHES = (
    BranchConfig(encoder="vit_nano", size=64, interactions=((0, 0), (1, 1)), arguments={"depth": 2}),
    BranchConfig(
        encoder="vit_nano",
        size=128,
        interactions=((0, 0), (1, 1)),
        arguments={"dim": 32, "depth": 2, "num_heads": 2},
    ),
)
PLAIN = PlainConfig(encoder="vit_nano", size=64, framing="pad")
PIIP = PiipConfig(
    branches=BRANCHES,
    interaction=InteractionConfig(num_heads=4),
    projector=ProjectorConfig(num_groups=8),
    framing="aspect",
)
UHD_V2 = UhdV2Config(encoder="vit_nano", size=64, max_slices=4, windows=WindowConfig(grid=(2, 2)))
SYSTEMS: dict[str, VisionConfig] = {
    "plain": PLAIN,
    "piip": PIIP,
    "uhd_v1": UhdV1Config(
        encoder="vit_nano", size=64, max_slices=4, windows=replace(V1_WINDOWS, grid=(2, 2))
    ),
    "uhd_v2": UHD_V2,
    "inf": InfConfig(
        encoder="vit_nano",
        size=64,
        resolutions=(64,),
        max_crops=6,
        enhancement=EnhancementConfig(num_heads=2),
    ),
    "anyres": AnyResConfig(encoder="vit_nano", size=64, grids="(1x1),...,(2x2)"),  # type: ignore[arg-type]
    "pyramid_shared": PyramidSharedConfig(
        encoder="vit_nano", sizes=(32, 64), projector=ProjectorConfig(num_groups=8), framing="aspect"
    ),
    "llava_hr": LlavaHrConfig(
        fast="vit_nano",
        slow="convnext_nano",
        size=128,
        fast_least=32,
        framing="aspect",
        slow_arguments={"strides": [4, 2, 2, 2]},
    ),
    "placed": PlacedConfig(system=settings_json(PLAIN)),
    "dropped": FewerTokensConfig(system=settings_json(UHD_V2), reduction="drop"),
}
