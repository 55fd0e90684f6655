"""POPE: what is a yes, and F1 with its parts against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.evaluate.yes_no import MEASURES, pope_counts, yes_or_no


@pytest.mark.parametrize(
    ("text", "ours", "official"),
    [
        ("Yes, there is.", "yes", "yes"),
        ("No, there is not", "no", "no"),
        ("There is a dog. No cat", "yes", "yes"),
        ("I do not see one", "no", "no"),
        ("NO", "no", "yes"),
        ("No!", "no", "yes"),
        ("no\n", "no", "yes"),
        ("No,there", "no", "yes"),
        ("snow", "yes", "yes"),
        ("", "", "yes"),
        (" . no", "", "yes"),
    ],
)
def test_reading(text, ours, official):
    assert yes_or_no(text) == ours
    assert yes_or_no(text, official=True) == official


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", ""]), st.sampled_from(["Yes", "no "])), min_size=1))
def test_measures_are_those_of_the_definitions(pairs):
    counts = np.sum([pope_counts(said, right) for said, right in pairs], 0)
    ours = {name: float(measure(counts)) for name, measure in MEASURES.items()}
    pairs = [(said, right.strip().lower()) for said, right in pairs]
    true = pairs.count(("yes", "yes"))
    said, right = ([pair[i] for pair in pairs].count("yes") for i in (0, 1))
    precision, recall = true / said if said else 0, true / right if right else 0
    assert ours == pytest.approx(
        {
            "f1": 2 * precision * recall / (precision + recall) if true else 0,
            "accuracy": sum(a == b for a, b in pairs) / len(pairs),
            "precision": precision,
            "recall": recall,
            "yes_ratio": said / len(pairs),
        }
    )


def test_an_answer_other_than_yes_and_no_is_refused():
    with pytest.raises(ValueError, match="the right answer is yes or no, got 'maybe'"):
        pope_counts("yes", "maybe")
