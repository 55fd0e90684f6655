"""A folder says the format it is saved in: the older are read, the newer refused, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from stepwell import cli
from stepwell.folders import FORMAT, SHIPPED, SHIPPED_MODELS, ModelError, check_format, model_type
from stepwell.models import config as module
from stepwell.models.processor import StepwellProcessor
from stepwell.models.register import MODELS
from stepwell.weights.light import load_light
from stepwell.weights.load import load

KINDS = sorted(MODELS)


def written(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def saved(kind: str, folder: Path, **changes: object) -> Path:
    """config.json of this kind alone, with changes."""
    MODELS[kind].config_class().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(written(folder) | changes))
    return folder


@pytest.fixture(params=sorted(SHIPPED_MODELS))
def shipped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(SHIPPED_MODELS[request.param], tmp_path / "model")


def say(folder: Path, number: object) -> Path:
    (folder / "config.json").write_text(json.dumps(written(folder) | {"stepwell_format": number}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_its_format_and_is_read_again(kind, tmp_path) -> None:
    folder = saved(kind, tmp_path)
    assert written(folder)["stepwell_format"] == FORMAT
    assert type(AutoConfig.from_pretrained(folder)) is MODELS[kind].config_class


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_reads_a_newer_format_whatever_else_is_in_it(kind, tmp_path) -> None:
    folder = saved(kind, tmp_path, stepwell_format=FORMAT + 1, something_new=1, pyramid={"new": 1})
    with pytest.raises(ValueError, match=rf"format {FORMAT + 1}, .* up to {FORMAT}: upgrade stepwell"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("number", ["1", 0, -1, 1.0, True, None])
def test_what_is_no_format_is_refused(number) -> None:
    with pytest.raises(ModelError, match=r"stepwell_format in config.json is a whole number"):
        check_format({"stepwell_format": number})


def test_a_folder_that_says_none_is_of_format_1(shipped) -> None:
    assert "stepwell_format" not in written(shipped)
    check_format({})
    assert model_type(shipped)


def test_a_newer_folder_is_refused_in_one_line_by_load_and_by_commands(shipped, capsys) -> None:
    say(shipped, 7)
    with pytest.raises(ModelError, match=r"^the model is saved in format 7, [^\n]* upgrade stepwell$"):
        load(shipped)
    picture = str(Path(__file__).parents[2] / "examples" / "receipt.jpg")
    kind = ["ask", picture, "What?"] if model_type_of(shipped) == "stepwell" else ["predict", picture]
    assert cli.main([*kind, "--model", str(shipped)]) == 2
    assert "format 7" in capsys.readouterr().err


def model_type_of(folder: Path) -> object:
    return written(folder)["model_type"]


def test_a_processor_beside_a_newer_model_is_refused(tmp_path) -> None:
    folder = say(shutil.copytree(SHIPPED, tmp_path / "model"), 2)
    with pytest.raises(ValueError, match="format 2"):
        StepwellProcessor.from_pretrained(folder)


def test_the_way_without_transformers_reads_what_it_knows(tmp_path) -> None:
    folder = say(shutil.copytree(SHIPPED, tmp_path / "model"), FORMAT)
    assert load_light(folder, device=torch.device("cpu")) is not None
    assert load_light(say(folder, FORMAT + 1), device=torch.device("cpu")) is None


def test_an_older_model_is_saved_in_the_newest_format(tmp_path, monkeypatch) -> None:
    folder = saved("stepwell", tmp_path, stepwell_format=1)
    monkeypatch.setattr("stepwell.folders.FORMAT", 2)
    monkeypatch.setattr(module, "FORMAT", 2)
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    assert written(folder)["stepwell_format"] == 2
