"""Stochastic depth."""

from __future__ import annotations

import pytest
import torch

from stepwell.layers.drop_path import DropPath, drop_path_rates


def test_whole_samples_are_dropped_and_the_mean_is_kept():
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert out.shape == (4000, 2, 3)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out.amin((1, 2)) == out.amax((1, 2))).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_evaluation_passes_everything():
    x = torch.randn(3, 4)
    assert torch.equal(DropPath(0.9).eval()(x), x)


def test_a_rate_of_one_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        DropPath(1.0)


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.4, 0.4, 0.4]), ("linear", [0.0, 0.2, 0.4])])
def test_rates_are_constant_or_grow_linearly(schedule, rates):
    assert drop_path_rates(0.4, 3, schedule) == pytest.approx(rates)
    with pytest.raises(ValueError, match="'cosine'"):
        drop_path_rates(0.4, 3, "cosine")
