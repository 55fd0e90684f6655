"""Settings of INF-LLaVA's vision that cannot be are refused where they are made, with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell.fuse.dual import EnhancementConfig
from stepwell.models.inf import InfConfig
from stepwell.models.systems import vision_settings

NANO: dict[str, Any] = {"depth": 2, "patch": 8, "position_grid": [6, 6]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 4, "resolutions": (4, 12)}, "size 4 is smaller than one cell of 8 pixels"),
        ({"std": (0.5, float("nan"), 0.5)}, "std: pixels are divided by std, which is above 0"),
        ({"select_layer": 9}, "select_layer 9 is not one of the 3 hidden states"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes: dict[str, Any], words: str) -> None:
    settings = {"kind": "inf", "arguments": NANO | {"dim": 32, "num_heads": 2}, "size": 48}
    with pytest.raises(ValueError, match=words) as caught:
        vision_settings(settings | {"resolutions": (48, 144)} | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dim", "enhancement", "words"),
    [
        (32, EnhancementConfig(num_heads=5), "32 is not a multiple of 5 heads; change enhancement.num_heads"),
        (15, EnhancementConfig(num_heads=3), "15 has no half for each map; change enhancement.fusion"),
        (15, EnhancementConfig(num_heads=3, fusion="linear_concat"), "change enhancement.fusion"),
    ],
)
def test_a_width_that_does_not_divide_is_told_when_it_is_built(
    dim: int, enhancement: EnhancementConfig, words: str
) -> None:
    config = InfConfig(
        arguments=NANO | {"dim": dim, "num_heads": 1},
        size=48,
        resolutions=(48, 144),
        enhancement=enhancement,
    )
    with pytest.raises(ValueError, match=words):
        config.build(64)
