"""Configurations say what is wrong, and survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from stepwell.models.config import StepwellConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.systems import vision_settings
from stepwell.models.vision import settings_json

BRANCHES = [{"encoder": "vit_nano", "size": 64, "interactions": [[0, 1], [2, 3]]}]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"kind": "plain", "sise": 4}, "vision_config: sise"),
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


def test_statistics_default_to_those_of_the_encoder():
    assert PlainConfig(encoder="augreg_s", size=224).geometry().mean == (0.5, 0.5, 0.5)
    assert PlainConfig().geometry().std == (0.26862954, 0.26130258, 0.27577711)
    branches = [{"encoder": name, "size": 224} for name in ("augreg_s", "deit_t")]
    assert PiipConfig(branches=branches).geometry().std == (0.5, 0.5, 0.5)  # of the largest network
    assert PiipConfig(branches=branches, mean=(0.1, 0.2, 0.3)).geometry().mean == (0.1, 0.2, 0.3)


def test_the_geometry_may_change_after_training_where_no_weight_depends_on_it():
    piip = PiipConfig(branches=[{"encoder": "vit_nano", "size": 64}])
    assert piip.adjusted({"sizes": [96], "framing": "crop"}).geometry().layout((9, 9)).inputs == ((96, 96),)
    assert PlainConfig().adjusted({"sizes": [448]}).size == 448
    for changes, complaint in (
        ({"interaction": {}}, "vision.interaction of a 'piip' system cannot change.*framing, mean"),
        ({"max_slices": 9}, "vision.max_slices"),
        ({"sizes": [64, 128]}, "1 views"),
        ({"framing": "stretch"}, "vision: framing"),
    ):
        with pytest.raises(ValueError, match=complaint):
            piip.adjusted(changes)


def test_the_language_model_decides_whether_embeddings_are_tied():
    assert StepwellConfig(None, LlamaConfig(tie_word_embeddings=True)).tie_word_embeddings
    with pytest.raises(ValueError, match=r"tie_word_embeddings is False, but text_config.* True"):
        StepwellConfig(None, LlamaConfig(tie_word_embeddings=True), tie_word_embeddings=False)


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
    assert vision_settings(settings_json(vision)) == vision
