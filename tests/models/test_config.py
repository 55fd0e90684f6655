"""Configurations say what is wrong, and survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from stepwell.models.config import StepwellConfig
from stepwell.models.settings import PiipConfig, PlainConfig, vision_json, vision_settings

BRANCHES = [{"encoder": "vit_nano", "size": 64, "interactions": [[0, 1], [2, 3]]}]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"kind": "plain", "sise": 4}, "plain.sise"),
        ({"kind": "piip"}, "branches"),
        ({"kind": "nothing"}, "'plain', 'piip'"),
        ({"kind": "piip", "branches": [{"encoder": "vit_nano", "size": 0}]}, "branches.0.size"),
        (
            {"kind": "piip", "branches": [{"encoder": "vit_nano", "size": 9, "interactions": [[1, 2]]}]},
            "from 0 on",
        ),
        (
            {"kind": "piip", "branches": [*BRANCHES, {"encoder": "vit_nano", "size": 9}]},
            "same number of interactions",
        ),
    ],
)
def test_wrong_settings_are_named(data, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        StepwellConfig(data)
    assert "\n" not in str(error.value)


def test_unknown_keys_are_refused_as_transformers_would_not():
    with pytest.raises(ValueError, match="'vision_confg'"):
        StepwellConfig(vision_confg={"kind": "plain"})


@pytest.mark.parametrize("vision", [PlainConfig(size=64), PiipConfig(branches=BRANCHES)])
def test_round_trip_through_a_folder(vision, tmp_path: Path):
    config = StepwellConfig(vision, LlamaConfig(hidden_size=32), image_token_id=7, template="qwen")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is StepwellConfig
    assert again.vision == vision
    assert again.text_config.hidden_size == 32
    assert (again.image_token_id, again.template) == (7, "qwen")
    assert vision_settings(vision_json(vision)) == vision
