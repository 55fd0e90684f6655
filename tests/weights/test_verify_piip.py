"""PIIP's parts equal the recorded official ones, on both paths, through the key tables of conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell.weights import verify_piip
from stepwell.weights.record import Unsupported, read_record
from stepwell.weights.verify import verify

RECORDED = sorted(
    file
    for file in (Path(__file__).parent.parent / "parity" / "piip").glob("*.safetensors")
    if file.name.startswith(("01", "02", "03", "09"))
)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert verdict.status == "ok", verdict.reason


def test_an_order_of_units_that_was_not_recorded_is_unsupported():
    record = read_record(next(file for file in RECORDED if "03_block3" in file.name))
    record.settings["unit_order"] = ["12", "23"]
    with pytest.raises(Unsupported, match="12"):
        verify_piip.CASES["piip.interaction_block"](record)
