"""Exact, ANLS and relaxed accuracy: cases worked by hand, and laws that edits obey."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.evaluate.metrics import anls, characters, edit_distance, exact, relaxed, spelled_alike

WORDS = st.text("abé ", max_size=6)


@given(WORDS, WORDS)
def test_edits_are_those_of_the_recursive_definition(a, b):
    @cache
    def edits(i, j):
        if not i or not j:
            return i + j
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == edits(len(a), len(b))


@pytest.mark.parametrize(
    ("prediction", "answers", "score", "official"),
    [
        ("Blue.", ["blue"], 1, 1),
        ("blue ..", ["Blue"], 1, 0),
        (" dark  blue", ["red", "dark blue"], 1, 0),
        ("blue", ["Blue"], 1, 0),  # GQA's answers are in small letters, so its evaluator need not care
        ("blue!", ["blue"], 0, 0),
        ("", ["blue"], 0, 0),
        ("", [""], 1, 1),
    ],
)
def test_exact(prediction, answers, score, official):
    assert exact(prediction, answers) == score
    assert exact(prediction, answers, official=True) == official


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("kitten", ["sitting"], 4 / 7),
        ("kitten", ["dog", "Sitting "], 4 / 7),
        ("ab", ["abcd"], 0.5),
        ("ab", ["abcde"], 0.0),
        (" INVOICE 42\n", ["invoice 42"], 1.0),
        ("", ["a"], 0.0),
    ],
)
def test_anls(prediction, answers, score):
    for official in (False, True):
        assert anls(prediction, answers, official=official) == pytest.approx(score)


def test_two_empty_texts_are_alike_unless_the_official_code_is_asked():
    assert anls(" ", ["", "a"]) == 1
    with pytest.raises(ZeroDivisionError, match="length of an answer, which is empty"):
        anls(" ", ["", "a"], official=True)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("104.9", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("0.0", "0", 0),
        ("0", "0", 1),
        ("1,000", "1000", 0),
        ("Red", "red", 1),
        ("Red ", "red", 0),
        ("nan", "nan", 0),
    ],
)
def test_relaxed(prediction, answer, score):
    assert relaxed(prediction, [answer]) == score
    assert relaxed(prediction, ["other", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "share"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("RM 8.50", ["rm8.50"], 1.0),
        ("", ["ABC"], 0.0),
        ("", [""], 1.0),
        ("ABCD", ["X", "AB"], 0.5),
    ],
)
def test_right_characters_are_those_that_need_no_edit(prediction, answers, share):
    assert characters(prediction, answers) == pytest.approx(share)
    assert spelled_alike(prediction, answers) == (share == 1.0)
