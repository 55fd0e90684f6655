"""What the records of two-stage detectors may say; their numbers are in test_recorded_det.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases_rcnn
from record import Record, Unsupported


def test_stages_of_a_cascade_are_looked_at_one_by_one():
    heads = [{"type": "shared_2fc"}, {"type": "convs"}]
    settings = {"roi_head": {"bbox_head": heads}}
    record = Record(path=Path(), system="piip", kind="det.cascade", case="", version="", settings=settings)
    with pytest.raises(Unsupported, match=r"roi_head.bbox_head.1.type 'convs'"):
        cases_rcnn.CASES[record.kind](record)
