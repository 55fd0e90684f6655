"""Images of a source that are resized before anything looks at them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stepwell.data.resized import Resized
from stepwell.data.sample import Sample


class Many:
    """A thousand samples."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return Sample(messages=({"role": "user", "content": str(index)},))

    def where(self, index):
        return f"entry {index}"


def halved(size):
    return size[0] // 2, size[1] // 2


def test_all_samples_are_resized_by_default_and_nothing_else_changes():
    source = Resized(Many(), halved)
    assert len(source) == 1000
    assert source.where(7) == "entry 7"
    assert source[7] == replace(Many()[7], resize=halved)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_share_of_them_is_the_same_ones_each_time(share):
    chosen = [
        {i for i in range(1000) if Resized(Many(), halved, share=share, seed=s)[i].resize} for s in (3, 3, 4)
    ]
    assert abs(len(chosen[0]) - 1000 * share) <= 50
    assert chosen[0] == chosen[1]
    assert not share or chosen[0] != chosen[2]
