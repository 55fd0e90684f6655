"""Questions about pages."""

from __future__ import annotations

import random

import pytest

from stepwell.reader.page import Line
from stepwell.reader.questions import ANSWER_SHORTLY, BOX_FORMAT, box_text, fractions_of, turns_about

TOTAL = Line(text="TOTAL 8.50", box=(10, 80, 110, 90), edges=tuple(range(10, 111, 10)))
PRICE = Line(text="8.50", box=(10, 20, 50, 30), edges=(10, 20, 30, 40, 50))


def test_boxes_are_fractions_of_width_and_height():
    assert box_text(fractions_of((10, 20, 50, 200), (200, 100))) == "[0.100, 0.100, 0.500, 1.000]"


def test_boxes_outside_the_image_are_cut():
    assert box_text(fractions_of((-5, 0, 120, 50), (100, 100))) == "[0.000, 0.000, 1.000, 0.500]"


def test_the_box_asked_for_surrounds_the_line():
    (question, _), _ = turns_about([PRICE], {}, (100, 200), reads=1, chance=random.Random(0))
    left, top, right, bottom = (float(x) for x in question["content"].split("[")[1].split("]")[0].split(","))
    assert left <= 0.05
    assert top <= 0.2
    assert right >= 0.25
    assert bottom >= 0.3


def test_a_total_points_to_the_row_that_is_labelled_so():
    for seed in range(5):
        _, (line,) = turns_about(
            [PRICE, TOTAL], {"total": "8.50"}, (100, 200), reads=0, chance=random.Random(seed)
        )
        assert line == TOTAL.part("8.50")
        assert line.edges == (70, 80, 90, 100, 110)


def test_wordings_are_those_of_the_receipt_questions():
    said = {
        message["content"].replace("<image>\n", "").replace(ANSWER_SHORTLY, "").split("[")[0]
        for seed in range(40)
        for message in turns_about(
            [PRICE], {"date": "1/2/2020"}, (100, 200), reads=1, chance=random.Random(seed)
        )[0]
    }
    assert "What text is written inside the region " in said
    assert "On which date was this receipt issued?" in said
    assert BOX_FORMAT.strip() == (
        "The numbers are left, top, right and bottom as fractions of the image width and height."
    )


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="cashier"):
        turns_about([], {"cashier": "BOB"}, (10, 10), reads=0, chance=random.Random(0))


def test_a_line_needs_an_edge_more_than_characters():
    with pytest.raises(ValueError, match="3 characters need 4 edges, got 3"):
        Line(text="ABC", box=(0, 0, 1, 1), edges=(0, 1, 2))
