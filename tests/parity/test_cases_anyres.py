"""Recorded AnyRes tokens and data tables are ours, and a table that is changed is told from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import verify
from record import Record, read_record

GOLDEN = Path(__file__).parent / "inf"
MERGE, TABLE = GOLDEN / "anyres_merge.safetensors", GOLDEN / "data_pipeline.json"


def record_of(path: Path) -> Record:
    record = read_record(path)
    assert record is not None
    return record


def test_recorded_tokens_are_ours_exactly() -> None:
    record = record_of(MERGE)
    assert record.limits("flat.0") == (0, 0)
    assert verify.verify(record) == verify.Verdict("ok", 0.0)


def test_all_of_the_table_is_checked() -> None:
    assert verify.verify(record_of(TABLE)) == verify.Verdict("ok", 0.0)


@pytest.mark.parametrize("output", ["flat.1", "spatial.3", "spatial_unpad.4", "spatial_unpad.single"])
def test_a_token_elsewhere_fails(output: str) -> None:
    record = record_of(MERGE)
    record.outputs[output] = record.outputs[output].roll(1, 0)
    verdict = verify.verify(record)
    assert (verdict.status, verdict.reason) == ("FAILED", f"reference path: output {output}")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("anyres_select", lambda rows: rows[0]["default_pinpoints_best_wh"].reverse(), "default [336, 336]"),
        ("anyres_select", lambda rows: rows[3]["default_grid_wh"].reverse(), "default grid of [1024, 300]"),
        ("anyres_select", lambda rows: rows[3]["wide_pinpoints_best_wh"].reverse(), "wide [1024, 300]"),
        ("anyres_pinpoints_wide", lambda targets: targets.reverse(), "wide"),
        ("anyres_resize_and_pad", lambda rows: rows[3]["content_box_xyxy"].reverse(), "content_box_xyxy"),
        ("anyres_resize_and_pad", lambda rows: rows[1].update(tiles=5), "tiles 4, recorded 5"),
        ("pad_to_square", lambda rows: rows[1]["result_hwc"][0][3].reverse(), "1: 3x4 image"),
        ("modality_length_grouping", lambda rows: rows[3]["indices"].reverse(), "3: [18"),
        ("even_chunks", lambda rows: rows[1]["chunks"].reverse(), "1: [[0"),
    ],
)
def test_every_part_of_the_table_counts(part: str, change: Any, says: str, tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    change(table[part])
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8")
    verdict = verify.verify(record_of(tmp_path / "a.json"))
    assert verdict.status == "FAILED"
    assert verdict.reason.startswith(f"reference path: {part}/")
    assert says in verdict.reason


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (MERGE, "newline_at", "start_of_each_row"),
        (MERGE, "pinpoints", [[56, 100]]),
        (TABLE, "canvas_rgb", [1, 0, 0]),
        (TABLE, "size_order", "height_width"),
    ],
)
def test_what_is_not_ours_is_unsupported(path: Path, key: str, value: Any) -> None:
    record = record_of(path)
    record.settings[key] = value
    assert verify.verify(record).status == "unsupported"
