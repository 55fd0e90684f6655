"""What the records of DINO may say; that their numbers come back is in test_recorded_det.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_dino
from record import Unsupported, read_record

WHOLE = Path(__file__).parent / "det" / "35_dino_one_empty_a.safetensors"


@pytest.mark.parametrize(("part", "key"), [("neck", "num_outs"), ("neck", "out_channels")])
def test_a_neck_that_does_not_fit_the_head_is_unsupported(part, key):
    record = read_record(WHOLE)
    record.settings[part][key] += 1
    with pytest.raises(Unsupported):
        cases_dino.CASES["det.dino"](record)
