"""A golden file is read as it was written; what it does not say is empty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from record import read_record

FACTS: dict[str, Any] = {"system": "s", "kind": "k", "case": "c", "version": "v", "settings": {"depth": 2}}


def write(path: Path, **facts: Any) -> Path:
    tensors = {"param.w": torch.ones(2), "in.x": torch.zeros(1), "out.y": torch.full((3,), 2.0)}
    save_file(tensors, path, metadata={"json": json.dumps(FACTS | facts)})
    return path


def test_tensors_are_told_apart_by_their_prefix(tmp_path: Path) -> None:
    record = read_record(write(tmp_path / "a.safetensors", tolerance={"rtol": 0, "atol": 0}))
    assert record is not None
    assert (record.params.keys(), record.inputs.keys(), record.outputs.keys()) == ({"w"}, {"x"}, {"y"})
    assert record.outputs["y"].tolist() == [2.0] * 3
    assert (record.kind, record.settings) == ("k", {"depth": 2})


@pytest.mark.parametrize(("written", "read"), [({}, ()), ({"params_without_influence": ["w"]}, ("w",))])
def test_parameters_without_influence_need_not_be_listed(
    tmp_path: Path, written: dict[str, Any], read: tuple[str, ...]
) -> None:
    record = read_record(write(tmp_path / "a.safetensors", tolerance={"rtol": 0, "atol": 0}, **written))
    assert record is not None
    assert record.params_without_influence == read


def test_the_tolerance_may_differ_by_output(tmp_path: Path) -> None:
    tolerance = {"rtol": 1e-3, "atol": {"y": 1e-5, "z": 1e-2}}
    record = read_record(write(tmp_path / "a.safetensors", tolerance=tolerance))
    assert record is not None
    assert (record.limits("y"), record.limits("z")) == ((1e-3, 1e-5), (1e-3, 1e-2))


def test_a_table_keeps_everything_but_its_heading(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(FACTS | {"squares": [1, 4]}))
    record = read_record(path)
    assert record is not None
    assert (record.table, record.params) == ({"squares": [1, 4]}, {})


def test_a_table_may_have_its_kind_alone_for_a_heading(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"kind": "k", "rows": [1]}))
    record = read_record(path)
    assert record is not None
    assert (record.kind, record.case, record.settings, record.table) == ("k", "a", {}, {"rows": [1]})
    path.write_text(json.dumps({"keys": {}}))
    assert read_record(path) is None


def test_weights_without_a_record_are_none(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read_record(tmp_path / "model.safetensors") is None


def test_a_record_that_lacks_a_fact_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KeyError: 'tolerance'"):
        read_record(write(tmp_path / "a.safetensors"))
