"""Sources in proportion."""

from __future__ import annotations

import pytest

from stepwell.data.mixture import Mixture
from stepwell.data.sample import Sample


class Numbers:
    """Samples whose answer says where they came from; the broken ones raise."""

    def __init__(self, name, count, broken=()):
        self.name, self.count, self.broken = name, count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return Sample(image=None, messages=({"role": "user", "content": f"{self.name}{index}"},))


def answers(mixture):
    return [mixture[i].messages[0]["content"] for i in range(len(mixture))]


def test_sources_come_in_proportion_to_their_weights():
    said = answers(Mixture([Numbers("a", 10), Numbers("b", 10)], [3, 1], length=400))
    assert 270 < sum(answer.startswith("a") for answer in said) < 330


def test_an_index_always_leads_to_the_same_sample():
    sources = [Numbers("a", 10), Numbers("b", 10)]
    assert answers(Mixture(sources, [1, 1], length=50)) == answers(Mixture(sources, [1, 1], length=50))
    assert answers(Mixture(sources, [1, 1], length=50)) != answers(
        Mixture(sources, [1, 1], length=50, seed=1)
    )


def test_broken_samples_are_replaced_counted_and_logged(caplog):
    mixture = Mixture([Numbers("a", 4, broken={0, 1})], [1], length=60)
    assert set(answers(mixture)) == {"a2", "a3"}
    assert mixture.skipped == len(caplog.records) > 10
    assert "truncated" in caplog.text


def test_a_source_without_a_readable_sample_stops_the_run():
    with pytest.raises(RuntimeError, match="20 samples in a row"):
        Mixture([Numbers("a", 2, broken={0, 1})], [1], length=1)[0]


def test_weights_must_fit():
    with pytest.raises(ValueError, match="positive weight"):
        Mixture([Numbers("a", 2)], [0], length=1)
    with pytest.raises(ValueError, match="source 1 is empty"):
        Mixture([Numbers("a", 2), Numbers("b", 0)], [1, 1], length=1)


def test_no_sample_comes_again_before_all_of_its_source_have_come():
    said = answers(Mixture([Numbers("a", 10), Numbers("b", 7)], [2, 1], length=90))
    for name, count in (("a", 10), ("b", 7)):
        of_this = [answer for answer in said if answer[0] == name]
        epochs = [of_this[start : start + count] for start in range(0, len(of_this), count)]
        assert len(epochs) > 2
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_sources_are_shuffled_each_in_its_own_way():
    said = answers(Mixture([Numbers("a", 50), Numbers("b", 50)], [1, 1], length=60))
    orders = [[answer[1:] for answer in said if answer[0] == name][:20] for name in "ab"]
    assert orders[0] != orders[1]
