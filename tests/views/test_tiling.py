from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.ops.sliding_windows import Window
from stepwell.views.tiling import Tiles, scaled_window


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(16, 80),
    st.floats(0.05, 0.9),
    st.floats(0.2, 3),
)
def test_tiles_cover_the_picture_in_both_grids(size, side, overlap, scale):
    tiles = Tiles(size=side, overlap=overlap, scale=scale)
    seen, scaled = np.zeros(size, bool), np.zeros(tiles.scaled(size), bool)
    for tile in tiles.cut(size, side=1000):
        for grid, (top, left, bottom, right) in ((seen, tile.source), (scaled, tile.view)):
            assert 0 <= top < bottom <= grid.shape[0]
            assert 0 <= left < right <= grid.shape[1]
            grid[top:bottom, left:right] = True
        assert tile.size == tuple(min(side, length) for length in scaled.shape)
    assert seen.all()
    assert scaled.all()


def test_neighbours_overlap_alike_and_the_last_ends_at_the_border():
    tiles = Tiles(size=100, overlap=0.25).cut((100, 300), side=1)
    assert [(tile.source.left, tile.source.right) for tile in tiles] == [
        (0, 100),
        (66, 166),
        (133, 233),
        (200, 300),
    ]
    assert all(tile.view == tile.source for tile in tiles)


@given(st.integers(1, 500), st.integers(2, 80), st.floats(0.05, 0.9))
def test_tiles_overlap_by_what_was_asked_for_and_are_no_more_than_needed(length, side, overlap):
    tiles = Tiles(size=side, overlap=overlap).cut((side, length), side=1)
    for one, after in pairwise(tiles):
        assert one.source.right - after.source.left >= min(overlap * side, side - 1) - 1e-9
    alone = max(0, length - side) / max(1, int(side * (1 - overlap)))
    assert len(tiles) < alone + 2


def test_at_half_the_scale_a_tile_shows_twice_as_much():
    tiles = Tiles(overlap=0.5, scale=0.5).cut((200, 400), side=100)
    assert [tile.source for tile in tiles] == [Window(0, left, 200, left + 200) for left in (0, 100, 200)]
    assert {tile.size for tile in tiles} == {(100, 100)}


def test_windows_that_share_an_edge_still_do_at_another_size():
    edges = [scaled_window(Window(0, x, 1, x + 1), (7, 7), (1000, 1000)) for x in range(7)]
    assert [one.right for one in edges[:-1]] == [one.left for one in edges[1:]]
    assert (edges[0].left, edges[-1].right) == (0, 1000)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 1}, "size"),
        ({"size": 0.5}, "size"),
        ({"overlap": 0.0}, "above 0 and up to 0.9"),
        ({"overlap": 0.91}, "above 0 and up to 0.9"),
        ({"scale": 0.0}, "scaled by more than 0"),
        ({"scale": 17.0}, "at most 16"),
        ({"scale": float("nan")}, "scaled by"),
    ],
)
def test_tiles_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**wrong)
