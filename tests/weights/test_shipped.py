"""The models that travel with the package."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import stepwell
from stepwell import cli
from stepwell.folders import SHIPPED, SHIPPED_DETECTOR, SHIPPED_MODELS, HubError, ModelError

KINDS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_a_shipped_model_is_loaded_by_its_name_and_has_a_card(name):
    assert stepwell.load(name) is not None
    card = (SHIPPED_MODELS[name] / "README.md").read_text("utf-8")
    assert f"# {name}" in card
    assert "license: apache-2.0" in card


def test_the_shipped_detector_is_small_and_computes_in_single_precision():
    weights = SHIPPED_DETECTOR / "model.safetensors"
    assert weights.stat().st_size <= 4 * 2**20
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    detector = stepwell.load("boards_tiny")
    assert detector.class_names == KINDS
    assert {parameter.dtype for parameter in detector.parameters()} == {torch.float32}


def test_predict_takes_the_shipped_detector_where_no_model_is_named(capsys, tmp_path):
    board = SHIPPED.parents[3] / "examples" / "board_1.jpg"
    assert cli.main(["predict", str(board), "--jsonl"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["image_size"] == [640, 640]
    assert {thing["class"] for thing in found["objects"]} <= {*KINDS}
    assert len(found["objects"]) >= 6


@pytest.mark.parametrize("name", [None, *SHIPPED_MODELS])
def test_a_shipped_model_has_no_revisions(name):
    with pytest.raises(ModelError, match=f"{name or 'reader_tiny'} is on this machine"):
        stepwell.load(name, revision="main")


def test_other_names_without_an_owner_are_refused_by_those_that_are_here():
    with pytest.raises((ModelError, HubError), match="reader_tiny or boards_tiny"):
        stepwell.load("boards_large")
