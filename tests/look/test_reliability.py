"""Bins of confidence against a case worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from stepwell.look.reliability import draw_reliability, reliability


def test_bins_and_error_are_those_worked_by_hand() -> None:
    found = reliability([0.0, 0.5, 0.6, 0.9, 1.0], [0, 1, 0, 1, 1], bins=2)
    assert found.edges == (0, 0.5, 1)
    assert found.counts == (2, 3)
    assert found.confidence == pytest.approx((0.25, 2.5 / 3))
    assert found.right == pytest.approx((0.5, 2 / 3))
    assert found.error == pytest.approx((2 * 0.25 + 3 * 0.5 / 3) / 5)
    assert found.as_json()["bins"][0] == {
        "from": 0,
        "to": 0.5,
        "answers": 2,
        "confidence": 0.25,
        "right": 0.5,
    }


def test_a_bin_without_answers_is_in_no_error() -> None:
    found = reliability([0.95, 0.95], [1, 0], bins=10)
    assert found.counts == (0,) * 9 + (2,)
    assert math.isnan(found.right[0])
    assert found.error == pytest.approx(0.45)
    assert found.as_json()["bins"][0] == {"from": 0, "to": 0.1, "answers": 0}


@pytest.mark.parametrize(("sure", "right"), [([], []), ([0.5], [1, 0]), ([1.5], [1])])
def test_what_is_no_confidence_is_refused(sure: list[float], right: list[float]) -> None:
    with pytest.raises(ValueError, match=r"confidence"):
        reliability(sure, right)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    draw_reliability(tmp_path / "curve.png", reliability([0.2, 0.9], [0, 1]), title="two answers")
    assert (tmp_path / "curve.png").stat().st_size > 5000
