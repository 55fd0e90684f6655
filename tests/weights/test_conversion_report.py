"""A report puts every name under one heading and says in words what stands in the way."""

from __future__ import annotations

import torch

from stepwell.keys.engine import Drop, Join, Rename, plan
from stepwell.keys.report import SHOWN, compare

RULES = [
    Rename("same|wide", r"\g<0>"),
    Rename("theirs", "ours"),
    Join(("left", "right"), "both", torch.cat),
    Drop(r"head\.\d+", "another task"),
]
THEIRS = {"same": (2,), "theirs": (), "left": (2, 3), "right": (1, 3), "head.0": (1,), "head.1": (1,)}
OURS = {"same": (2,), "ours": (), "both": (3, 3)}


def report(theirs, ours, absent=None):
    return compare("x", plan(theirs, RULES), theirs, ours, absent or {})


def test_every_name_has_one_heading():
    whole = report(THEIRS, OURS | {"text": (1,)}, {"text": "no text here", "same": "is there after all"})
    assert whole.ok
    assert whole.used == ["same"]
    assert whole.renamed == {"theirs": "ours", "left": "both", "right": "both"}
    assert whole.absent == {"text": "no text here"}
    assert whole.complaint() == ""
    assert whole.text().splitlines() == [
        "x: every tensor has its place",
        "  used         1",
        "  renamed      3",
        "  dropped      2",
        "    another task: head.0 and 1 more",
        "  missing      0",
        "  absent       1",
        "    no text here: text",
        "  unknown      0",
        "  wrong shape  0",
    ]


def test_what_does_not_fit_is_counted_and_its_first_name_told():
    theirs = THEIRS | {"wide": (2, 5), "right": (1, 4), "odd": (1,)}
    wrong = report(theirs, OURS | {"wide": (2, 6), "lost": (1,)})
    assert not wrong.ok
    assert wrong.complaint() == (
        "the tensors are not those of x: 2 of another shape (wide: expected 2x6, got 2x5), "
        "1 missing (lost), 1 unknown (odd)"
    )
    assert "    both: expected 3x3, got parts that do not fit together" in wrong.text().splitlines()
    assert "  absent" not in wrong.text()


def test_a_long_list_is_cut_in_the_text_and_whole_in_json():
    many = report({}, {f"t{i}": (1,) for i in range(SHOWN + 3)})
    assert many.text().splitlines()[-4] == "    t7"
    assert "    ... and 3 more" in many.text().splitlines()
    assert len(many.json()["missing"]) == SHOWN + 3
