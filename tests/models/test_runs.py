"""Layers before interactions are what the official configuration files say."""

from __future__ import annotations

import pytest

from stepwell.models.runs import layer_runs


@pytest.mark.parametrize(
    ("depth", "count", "first_runs", "last_run"),
    [
        (12, 12, [(0, 0), (1, 1)], (11, 11)),
        (24, 12, [(0, 1), (2, 3)], (22, 23)),
        (48, 12, [(0, 3), (4, 7)], (44, 47)),
        (32, 12, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 10)], (29, 31)),
        (39, 12, [(0, 2), (3, 6), (7, 10), (11, 13)], (35, 38)),
        (21, 12, [(0, 2), (3, 6), (7, 8), (9, 9)], (17, 20)),
        (39, 24, [(0, 1), (2, 2), (3, 4), (5, 6), (7, 9)], (37, 38)),
        (24, 24, [(0, 0)], (23, 23)),
        (12, 2, [(0, 5)], (6, 11)),
        (39, 2, [(0, 19)], (20, 38)),
        (32, 4, [(0, 7), (8, 15)], (24, 31)),
        (48, 4, [(0, 11)], (36, 47)),
    ],
)
def test_layer_runs_are_those_of_the_official_configurations(depth, count, first_runs, last_run):
    runs = layer_runs(depth, count)
    assert len(runs) == count
    assert list(runs[: len(first_runs)]) == first_runs
    assert runs[-1] == last_run
    assert [first for first, _ in runs[1:]] == [last + 1 for _, last in runs[:-1]]


def test_runs_that_were_not_published_are_not_guessed():
    assert layer_runs(12, 0) == ()
    with pytest.raises(ValueError, match="12 layers do not fall into 5"):
        layer_runs(12, 5)


@pytest.mark.parametrize("depth", [12, 24, 32, 39, 21, 48])
@pytest.mark.parametrize("count", [1, 2, 4, 6, 12])
def test_any_network_takes_the_usual_numbers_of_interactions(depth, count):
    """Fewer runs are runs of the twelve, joined; so ConvNeXts of all sizes meet at the same strides."""
    runs = layer_runs(depth, count)
    assert [layer for first, last in runs for layer in range(first, last + 1)] == list(range(depth))
    if depth in (21, 39):
        assert {last for _, last in runs} <= {last for _, last in layer_runs(depth, 12)}
