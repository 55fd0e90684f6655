"""examples/trl_sft.py: two steps of TRL with images in either way of writing them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import stepwell

EXAMPLE = Path(__file__).parents[2] / "examples/trl_sft.py"


@pytest.mark.slow
def test_trl_trains_a_folder_on_images_in_either_way_of_writing_them(
    assistant, folder, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl_sft.py", str(folder), "2"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.strip()
    spellings = {row["messages"][0]["content"][0]["type"] for row in names["rows"]}
    assert spellings == {"image", "image_url"}
    state = json.loads((tmp_path / "trl_sft/checkpoint-2/trainer_state.json").read_text())
    first, second = (line["loss"] for line in state["log_history"] if "loss" in line)
    assert 0 < second < first
    trained = stepwell.load("trl_sft/model", device="cpu").model.state_dict()
    before = assistant.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, trained[name])}
    assert any("vision" in name for name in moved)
    assert any("language_model" in name for name in moved)
