"""Masks as files hold them, against pycocotools."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from stepwell.data.masks import (
    LONGEST,
    compressed_mask,
    decode_mask,
    encode_mask,
    mask_area,
    mask_box,
    mask_spans,
)
from stepwell.data.objects import StoredMask

SIZE = (7, 9)
SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]


def polygon_mask(polygons, size):
    return reference.decode(reference.merge(reference.frPyObjects(polygons, *size))) > 0


def runs(mask):
    """Of (H, W), by hand: lengths of background and object by turns, down the columns."""
    counts, now = [0], False
    for value in mask.T.flatten().tolist():
        if value != now:
            counts.append(0)
            now = value
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("parts", [1, 3])
def test_polygons_cover_the_pixels_that_pycocotools_says(seed, parts):
    """Of whole numbers and fractions, of few points and many, past the edges too."""
    chance = np.random.default_rng(seed)
    size = tuple(chance.integers(1, 90, 2).tolist())
    polygons = [
        (chance.uniform(-0.3, 1.3, (chance.integers(3, 12), 2)) * size[::-1])
        .round(seed % 3)
        .flatten()
        .tolist()
        for _ in range(parts)
    ]
    mask = decode_mask(polygons, size)
    assert mask.dtype == bool
    assert mask.shape == size
    assert np.array_equal(mask, polygon_mask(polygons, size))
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    assert mask_box(polygons, size) == (*points.min(0), *points.max(0))


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (7, 9), (40, 30)])
def test_run_lengths_are_read_as_a_list_and_compressed_as_pycocotools_writes_them(size, share):
    mask = np.random.default_rng(0).random(size) < share
    mask[-1, 0] = True
    compressed = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    forms = [runs(mask), compressed["counts"], compressed["counts"].decode()]
    for counts in forms:
        told = {"size": [*size], "counts": counts}
        decoded = decode_mask(told, size)
        assert decoded.dtype == bool
        assert np.array_equal(decoded, mask)
        rows, cols = mask.nonzero()
        assert mask_box(told, size) == (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_the_box_of_run_lengths_is_that_of_their_pixels(height, width, data):
    """However few the runs are: of one column, of parts of two, of no length."""
    pixels = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(pixels).reshape(height, width)
    told = {"size": [height, width], "counts": [*runs(mask), 0, 0]}
    assert np.array_equal(decode_mask(told, (height, width)), mask)
    if mask.any():
        rows, cols = mask.nonzero()
        expected = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert mask_box(told, (height, width)) == expected
    else:
        with pytest.raises(ValueError, match="has no pixel"):
            mask_box(told, (height, width))


@pytest.mark.parametrize("order", ["C", "F"])
def test_written_masks_are_json_and_those_of_pycocotools(order):
    mask = np.asarray(np.random.default_rng(1).random((30, 41)) < 0.4, order=order)
    written = encode_mask(mask)
    assert np.array_equal(decode_mask(json.loads(json.dumps(written)), mask.shape), mask)
    counts = reference.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert written == {"size": [30, 41], "counts": counts.decode()}


def test_a_mask_without_a_pixel_comes_back():
    mask = np.zeros(SIZE, dtype=bool)
    assert not decode_mask(encode_mask(mask), SIZE).any()


def drawn(spans, size):
    column_by_column = np.zeros(size[0] * size[1], dtype=bool)
    for start, end in spans.tolist():
        column_by_column[start:end] = True
    return column_by_column.reshape(size[::-1]).T


@pytest.mark.parametrize("counts", [[63], [0, 63], [0, 5, 58], [7, 56], [7, 1, 55]])
def test_spans_are_the_runs_of_the_object(counts):
    mask = {"size": [*SIZE], "counts": counts}
    assert np.array_equal(drawn(mask_spans(mask, SIZE), SIZE), decode_mask(mask, SIZE))


@pytest.mark.parametrize("line", [[], [2, 3], [2, 3, 8, 6]])
def test_parts_of_a_point_or_two_are_no_polygons(line):
    assert mask_box([line, SQUARE], SIZE) == mask_box([SQUARE], SIZE)
    assert np.array_equal(decode_mask([SQUARE, line], SIZE), decode_mask([SQUARE], SIZE))
    with pytest.raises(ValueError, match="not x and y of three points or more"):
        decode_mask([line], SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_any_form_is_compressed_without_its_pixels_as_they_would_be(seed):
    chance = np.random.default_rng(seed)
    size = (31, 40)
    polygons = [chance.uniform(0, 40, 12).tolist() for _ in range(2)]
    mask = decode_mask(polygons, size)
    expected = {"size": [*size], "counts": reference.encode(np.asfortranarray(mask, np.uint8))["counts"]}
    text = expected["counts"].decode()
    for told in (polygons, *({"size": [*size], "counts": x} for x in (runs(mask), text, text.encode()))):
        assert compressed_mask(told, size) == {"size": [*size], "counts": text}
        assert np.array_equal(drawn(mask_spans(told, size), size), mask)
    assert mask_area(expected) == mask_area(encode_mask(mask)) == mask.sum()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_stored_mask_has_the_run_lengths_of_its_pixels(orientation):
    size = (31, 40)
    polygon = np.random.default_rng(0).uniform(0, 30, 10).tolist()
    stored = StoredMask(segmentation=[polygon], size=size, orientation=orientation)
    written = stored.run_lengths()
    assert written == encode_mask(stored.pixels())
    assert written["size"] == ([40, 31] if orientation == 6 else [31, 40])
    assert np.array_equal(drawn(stored.spans(), stored.pixels().shape), stored.pixels())


def test_compressed_run_lengths_are_handed_through(monkeypatch):
    """Not decoded, nor looked at once more."""
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    stored = StoredMask(segmentation={"size": [*SIZE], "counts": "anything"}, size=SIZE)
    assert stored.run_lengths() == {"size": [*SIZE], "counts": "anything"}


def rle(counts, size=SIZE):
    return {"size": [*size], "counts": counts}


FULL = encode_mask(np.ones(SIZE, dtype=bool))["counts"]


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        (None, "neither polygons nor run lengths"),
        ("text", "neither polygons nor run lengths"),
        (7, "neither polygons nor run lengths"),
        ([], "neither polygons nor run lengths"),
        (SQUARE, "one flat list; a polygon is a list in a list"),
        ([[]], r"the polygon \[\], not x and y of three points"),
        ([SQUARE[:4]], "not x and y of three points"),
        ([SQUARE[:7]], "not x and y of three points"),
        ([[*SQUARE, "1", "2"]], "not x and y of three points"),
        ([[*SQUARE, None, 2]], "not x and y of three points"),
        ([[*SQUARE, True, 2]], "not x and y of three points"),
        ([[*SQUARE, float("nan"), 2]], "not x and y of three points"),
        ([[*SQUARE, float("inf"), 2]], "not x and y of three points"),
        ([[*SQUARE, 10**400, 2]], "not x and y of three points"),
        ([[*SQUARE, 10**400, 2.5]], "not x and y of three points"),
        ([SQUARE, {"x": 1}], "not x and y of three points"),
        ([SQUARE, 5], "the polygon 5, not x and y of three points"),
        ([[SQUARE]], "not x and y of three points"),
        ([[1e9, 1, 1e9, 4, 1e9, 5]], "reaches over more than 1,000,000 pixels"),
        ([[0, 0, 9e5, 1, 0, 2]], "reaches over more than 1,000,000 pixels"),
        ([[0, 0, 5e5, 1, -5e5, 2]], "reaches over more than 1,000,000 pixels"),
        ({}, "is of size None, its image"),
        ({"counts": [63]}, "is of size None, its image"),
        (rle([63], (9, 7)), r"is of size \[9, 7\], its image \[7, 9\]"),
        (rle(None), "the counts None, not lengths of runs"),
        (rle({}), "the counts {}, not lengths of runs"),
        (rle([]), r"the counts \[\], not lengths of runs"),
        (rle([60.0, 3.0]), "not lengths of runs"),
        (rle([60, "3"]), "not lengths of runs"),
        (rle([[60], 3]), "not lengths of runs"),
        (rle([64, -1]), "not lengths of runs"),
        (rle([10**400]), "not lengths of runs"),
        (rle([62]), "do not add up to the 63 pixels"),
        (rle([60, 2]), "do not add up to the 63 pixels"),
        (rle([60, 4]), "do not add up to the 63 pixels"),
        (rle([2**63 - 1, 2**63 - 1, 65]), "do not add up to the 63 pixels"),
        (rle(""), "not lengths of runs"),
        (rle("zzzzzzzz"), "no compressed run lengths"),
        (rle(b"\x7f\x7f"), "no compressed run lengths|do not add up"),
        (rle("\ud800é"), "no compressed run lengths"),
        (rle(FULL[:-1]), "no compressed run lengths|do not add up"),
        (rle("55"), "do not add up to the 63 pixels"),
    ],
)
def test_what_is_no_mask_of_its_image_is_refused_in_one_line(segmentation, complaint):
    for look in (decode_mask, mask_box):
        with pytest.raises(ValueError, match=complaint) as refusal:
            look(segmentation, SIZE)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 200


def test_a_polygon_may_be_as_long_as_it_can_be_drawn():
    side = LONGEST // 4 - 1
    assert decode_mask([[0, 0, side, 0, side, side, 0, side]], SIZE).all()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12) | st.text(max_size=12))
def test_whatever_compressed_run_lengths_hold_is_a_mask_or_a_refusal(counts):
    try:
        mask = decode_mask(rle(counts), SIZE)
    except ValueError:
        return
    assert mask.shape == SIZE


def test_a_missing_library_is_named_where_it_is_needed(monkeypatch):
    """Not for run lengths in a list, nor for a look at polygons."""
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert decode_mask(rle([60, 3]), SIZE).sum() == 3
    assert mask_box([SQUARE], SIZE) == (1, 1, 5, 4)
    for segmentation in ([SQUARE], rle("55")):
        with pytest.raises(ImportError, match=r'pip install "stepwell\[detect\]"'):
            decode_mask(segmentation, SIZE)
    assert encode_mask(np.ones(SIZE, dtype=bool)) == rle(FULL)
