"""Images of a source that are resized before anything looks at them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
        {i for i in range(1000) if Resized(Many(), halved, share=share, seed=(s,))[i].resize}
        for s in (3, 3, 4)
    ]
    assert abs(len(chosen[0]) - 1000 * share) <= 50
    assert chosen[0] == chosen[1]
    assert not share or chosen[0] != chosen[2]


class Pictures(Many):
    """Two, the second one from a path that says so, and a text."""

    images = (("a/1.png", {"bytes": b"textvqa"}), (Path("data/TextVQA/2.png"),), ())

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return replace(super().__getitem__(index), images=self.images[index])


def test_images_may_be_told_by_their_paths_and_are_resized_once():
    some = Resized(Pictures(), halved, within="textVQA")
    assert [some[i].resize for i in range(3)] == [None, halved, None]
    rest = Resized(some, len)
    assert [rest[i].resize for i in range(3)] == [len, halved, len]
