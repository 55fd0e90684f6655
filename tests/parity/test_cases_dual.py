"""INF-LLaVA's crops and enhancement equal the recorded official ones, on both paths, through the key tables.

The recordings of the whole vision are too large for the repository; tests/models/test_inf.py says the same of
its parts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_dual
from record import Record, Unsupported, read_record
from verify import verify

GOLDEN = Path(__file__).parent / "inf"
RECORDED = sorted(
    file for pattern in ("dcm*", "mha*", "spatial_embed*") for file in GOLDEN.glob(f"{pattern}.safetensors")
)


def recorded(name: str) -> Record:
    record = read_record(next(file for file in RECORDED if file.name.startswith(name)))
    assert record is not None
    return record


def test_every_kind_but_the_large_one_is_recorded() -> None:
    assert {recorded(file.name).kind for file in RECORDED} == set(cases_dual.CASES) - {"inf.encode_images"}


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file: Path, path: str) -> None:
    verdict = verify(recorded(file.name), [path])  # type: ignore[list-item]
    assert (verdict.status, verdict.reason) == ("ok", "")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("dcm_n2", "global_rule", "contiguous_blocks"),
        ("dcm_n2", "index_order", "col_times_n_plus_row"),
        ("mha_d32", "linear_order", ["key", "query", "value", "output"]),
        ("mha_d32", "norm_eps", 1e-6),
        ("mha_d32", "out_bias", False),
        ("spatial_embed_n4", "global_query_windows", "strided"),
        ("spatial_embed_n4", "resize", "nearest"),
        ("spatial_embed_n4", "shared_attention", False),
        ("spatial_embed_n4", "out_grid", 24),
    ],
)
def test_settings_that_are_not_ours_are_named(file: str, key: str, value: object) -> None:
    record = recorded(file)
    record.settings[key] = value
    with pytest.raises(Unsupported):
        cases_dual.CASES[record.kind](record)
