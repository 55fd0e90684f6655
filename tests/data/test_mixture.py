"""Sources in proportion."""

from __future__ import annotations

import pytest

from stepwell.data.mixture import Drawn, InOrder, Mixture
from stepwell.data.sample import BadSample, Sample


class Numbers:
    """Samples whose answer says where they came from; the broken ones raise."""

    def __init__(self, name, count, broken=()):
        self.name, self.count, self.broken = name, count, broken

    def __len__(self):
        return self.count

    def where(self, index):
        return f"{self.name}.json, entry {index}"

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return Sample(messages=({"role": "user", "content": f"{self.name}{index}"},))


def said(sample):
    """What a batch would be made of."""
    return sample.messages[0]["content"]


def mixed(sources, weights, **settings):
    return Mixture(sources, weights, prepare=said, **settings)


def answers(mixture):
    return [mixture[i].sample for i in range(len(mixture))]


def test_sources_come_in_proportion_to_their_weights():
    answered = answers(mixed([Numbers("a", 10), Numbers("b", 10)], [3, 1], length=400))
    assert 270 < sum(answer.startswith("a") for answer in answered) < 330


def test_an_index_always_leads_to_the_same_sample():
    sources = [Numbers("a", 10), Numbers("b", 10)]
    assert answers(mixed(sources, [1, 1], length=50)) == answers(mixed(sources, [1, 1], length=50))
    assert answers(mixed(sources, [1, 1], length=50)) != answers(mixed(sources, [1, 1], length=50, seed=1))


def test_broken_samples_are_replaced_and_told():
    mixture = mixed([Numbers("a", 4, broken={0, 1})], [1], length=60)
    assert set(answers(mixture)) == {"a2", "a3"}
    bad = {sample for i in range(60) for sample in mixture[i].bad}
    assert bad == {BadSample(0, place, f"a.json, entry {place}", "truncated") for place in (0, 1)}
    again = mixed([Numbers("a", 4, broken={0, 1})], [1], length=60)  # in another process, behind a checkpoint
    assert [again[i] for i in range(60)] == [mixture[i] for i in range(60)]


def test_what_cannot_be_prepared_is_a_bad_sample_whatever_goes_wrong():
    def fail(sample):
        raise [ValueError("one\nline"), KeyError("x"), RecursionError(), TypeError("t")][
            int(said(sample)[1:])
        ]

    everything = InOrder([Numbers("a", 4)], fail)
    reasons = [everything[i].bad[0].reason for i in range(4)]
    assert reasons == ["one line", "'x'", "RecursionError", "t"]
    assert all(everything[i].sample is None for i in range(4))


@pytest.mark.parametrize(("patience", "looked_at"), [(1000, 300), (20, 20), (1, 1)])
def test_a_source_without_a_good_sample_is_given_up(patience, looked_at):
    drawn = mixed([Numbers("a", 300, broken=range(300))], [1], length=1, patience=patience)[0]
    assert drawn.sample is None
    assert len(set(drawn.bad)) == looked_at


def test_one_good_sample_among_many_is_found():
    assert answers(mixed([Numbers("a", 300, broken=range(299))], [1], length=5)) == ["a299"] * 5


def test_in_order_all_come_once_and_none_is_replaced():
    everything = InOrder([Numbers("a", 2, broken={1}), Numbers("b", 1)], said)
    bad = BadSample(0, 1, "a.json, entry 1", "truncated")
    assert [everything[i] for i in range(3)] == [Drawn("a0"), Drawn(None, (bad,)), Drawn("b0")]


def test_weights_must_fit():
    with pytest.raises(ValueError, match="positive weight"):
        mixed([Numbers("a", 2)], [0], length=1)
    with pytest.raises(ValueError, match="2 sources need a positive weight each, got"):
        mixed([Numbers("a", 2), Numbers("b", 2)], [1], length=1)
    with pytest.raises(ValueError, match="there is no source"):
        mixed([], None, length=1)
    for weights in ([1, 1], None):
        with pytest.raises(ValueError, match="source 1 is empty"):
            mixed([Numbers("a", 2), Numbers("b", 0)], weights, length=1)


@pytest.mark.parametrize("length", [0, 5, 17, 40])
def test_without_weights_each_sample_comes_once_before_any_comes_again(length):
    sources = [Numbers("a", 10), Numbers("b", 6), Numbers("c", 1)]
    answered = answers(mixed(sources, None, length=length))
    everything = {f"{name}{i}" for name, count in (("a", 10), ("b", 6), ("c", 1)) for i in range(count)}
    assert len(answered) == length
    for start in range(0, length, 17):
        epoch = answered[start : start + 17]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < 17 or set(epoch) == everything
    assert answered == answers(mixed(sources, None, length=length))
    if length == 40:
        assert answered != answers(mixed(sources, None, length=length, seed=1))
        assert answered[:17] != answered[17:34]
        assert sorted(answered[:17]) != answered[:17]


def test_no_sample_comes_again_before_all_of_its_source_have_come():
    answered = answers(mixed([Numbers("a", 10), Numbers("b", 7)], [2, 1], length=90))
    for name, count in (("a", 10), ("b", 7)):
        of_this = [answer for answer in answered if answer[0] == name]
        epochs = [of_this[start : start + count] for start in range(0, len(of_this), count)]
        assert len(epochs) > 2
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_sources_are_shuffled_each_in_its_own_way():
    answered = answers(mixed([Numbers("a", 50), Numbers("b", 50)], [1, 1], length=60))
    orders = [[answer[1:] for answer in answered if answer[0] == name][:20] for name in "ab"]
    assert orders[0] != orders[1]


def test_an_epoch_is_as_many_as_hold_no_sample_twice():
    sources = [range(10), range(30)]
    assert Mixture(sources, None, length=80, prepare=str).epoch == 40
    assert Mixture(sources, [3.0, 1.0], length=80, prepare=str).epoch == 13


def test_every_batch_has_its_share_of_each_source():
    sources = [Numbers("a", 50), Numbers("b", 20), Numbers("c", 20)]
    mixture = mixed(sources, [4, 0.75, 0.25], length=200, even=5)
    answered = [answer[0] for answer in answers(mixture)]
    batches = [answered[start : start + 5] for start in range(0, 200, 5)]
    assert all(batch.count("a") == 4 for batch in batches)
    assert 22 <= answered.count("b") <= 38  # 30 of 40 on average
    assert len({batch.index("b") for batch in batches if "b" in batch}) > 2  # at any place of a batch
    turns = [answer for answer in answers(mixture) if answer[0] == "a"]
    assert len(set(turns[:50])) == 50  # none again before all have come


def test_an_even_mixture_begins_as_a_longer_one():
    sources = [Numbers("a", 10), Numbers("b", 10)]
    short, long = (answers(mixed(sources, [3, 1], length=length, even=4)) for length in (22, 44))
    assert len(short) == 22
    assert short == long[:22]
