"""LLaVA-UHD's window attention equals the recorded official one, on both paths, through the key tables."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_windows
from record import Record, Unsupported, read_record
from verify import verify

GOLDEN = Path(__file__).parent / "uhd"
RECORDED = sorted(
    file
    for pattern in ("adapt_unfold*", "hiwin*", "v1_resampler*", "pos_embed*", "pooling_choice*")
    for file in GOLDEN.glob(pattern)
)


def recorded(name: str) -> Record:
    record = read_record(next(file for file in RECORDED if file.name.startswith(name)))
    assert record is not None
    return record


def test_every_kind_is_recorded() -> None:
    assert {recorded(file.name).kind for file in RECORDED} == set(cases_windows.CASES)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file: Path, path: str) -> None:
    verdict = verify(recorded(file.name), [path])  # type: ignore[list-item]
    assert (verdict.status, verdict.reason) == ("ok", "")


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("adapt_unfold", "roi_aligned", True),
        ("adapt_unfold", "roi_sampling_ratio", 2),
        ("adapt_unfold", "pool_tie", "last"),
        ("adapt_unfold", "pool_candidates", [[3, 3]]),
        ("adapt_unfold", "map_layout", "BCHW"),
        ("pooling_choice", "distance", "difference"),
        ("hiwin_mask7", "level_embedding_on", "values"),
        ("hiwin_mask7", "value_gets_position", True),
        ("hiwin_mask7", "norm_eps", 1e-5),
        ("hiwin_mask7", "upsampler.border", "zeros"),
        ("v1_resampler", "kv_projection_bias", True),
        ("v1_resampler", "kv_projection", True),
        ("pos_embed", "first_half", "y"),
    ],
)
def test_settings_that_are_not_ours_are_named(file: str, path: str, value: object) -> None:
    record = recorded(file)
    *parents, key = path.split(".")
    place = record.settings
    for parent in parents:
        place = place[parent]
    assert key in place
    place[key] = value
    with pytest.raises(Unsupported, match=rf"^{path} "):
        cases_windows.CASES[record.kind](record)


def test_a_choice_of_bins_that_differs_is_told() -> None:
    record = recorded("pooling_choice")
    record.table["rows"][3][2] += 1
    assert verify(record).status == "FAILED"
    record = recorded("adapt_unfold_small")
    record.settings["maps"][0]["pool_rows_cols"] = [9, 9]
    assert "recorded [9, 9]" in verify(record).reason
