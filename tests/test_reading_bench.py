"""The recipes and tools by which the shipped reader is trained and measured, in benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepwell.train.recipe import load_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPES = sorted(path for path in (BENCHMARKS / "reading").rglob("*.yaml") if path.stem != "base")


@pytest.fixture(scope="module")
def reading():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import reading

        yield reading


def write(folder: Path, **weights: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "origin.json"):
        (folder / name).write_text(folder.name)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path):
    assert load_recipe(path).stages


def test_a_model_between_two_has_weights_between_theirs(reading, tmp_path):
    first = write(tmp_path / "first", weight=torch.tensor([1.0, 4.0]).half(), count=torch.tensor(2))
    second = write(tmp_path / "second", weight=torch.tensor([3.0, 0.0]).half(), count=torch.tensor(2))
    assert reading.between(first, second, 0.25, tmp_path / "mixed") == 0
    mixed = load_file(tmp_path / "mixed/model.safetensors")
    assert mixed["weight"].tolist() == [1.5, 3.0]
    assert mixed["weight"].dtype == torch.float16
    assert mixed["count"] == 2
    assert sorted(path.name for path in (tmp_path / "mixed").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert (tmp_path / "mixed/config.json").read_text() == "second"
    modes = {path.stat().st_mode for path in (tmp_path / "mixed").iterdir()}
    assert len(modes) == 1
    with pytest.raises(ValueError, match="is there already"):
        reading.between(second, first, 0.25, tmp_path / "mixed")
    assert (tmp_path / "mixed/config.json").read_text() == "second"


def test_half_a_model_between_two_is_none(reading, tmp_path, monkeypatch):
    first, second = (write(tmp_path / name, weight=torch.zeros(2)) for name in ("first", "second"))

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            reading.between(first, second, 0.5, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    assert reading.between(first, second, 0.5, tmp_path / "mixed") == 0


def test_models_of_different_weights_have_none_between_them(reading, tmp_path):
    first = write(tmp_path / "first", weight=torch.zeros(2))
    second = write(tmp_path / "second", other=torch.zeros(2))
    with pytest.raises(ValueError, match="have different weights"):
        reading.between(first, second, 0.5, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
