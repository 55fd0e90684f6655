"""Weights may be read by whoever may read the settings beside them."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from small_releases import shrink, small_state

from stepwell.models.perception import PyramidForImageClassification
from stepwell.weights.convert import convert
from stepwell.weights.write import new_folder, write_safetensors

NAME = "piip_cls_sbl_320_160_96"


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_converted_and_a_saved_folder_are_as_open_as_any_other(umask, tmp_path, monkeypatch):
    shrink(NAME, monkeypatch)
    torch.save(small_state(NAME), tmp_path / "released.pth")
    convert(tmp_path / "released.pth", tmp_path / "out", as_=NAME, max_shard_bytes=1_000_000)
    model = PyramidForImageClassification.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    for folder in (tmp_path / "out", tmp_path / "saved"):
        assert mode(folder) == 0o777 & ~umask
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert {mode(path) for path in folder.iterdir()} == {0o666 & ~umask}


def test_no_other_file_is_left(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        write_safetensors(folder, {"a": torch.ones(2, device="meta")}, lambda name: torch.ones(2))
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
