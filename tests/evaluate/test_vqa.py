"""VQA accuracy is a mean over nine of ten people; normalisation has the official rules without their bugs."""

from __future__ import annotations

from itertools import combinations

import pytest

from stepwell.evaluate.vqa import vqa_accuracy, vqa_normalised, vqa_words


@pytest.mark.parametrize("matches", range(11))
def test_accuracy_is_the_mean_over_all_nine_of_ten(matches):
    answers = ["a red bus"] * matches + ["tram"] * (10 - matches)
    nines = list(combinations(answers, 9))
    expected = sum(min(1, nine.count("a red bus") / 3) for nine in nines) / len(nines)
    assert vqa_accuracy("Red bus!", answers) == pytest.approx(expected)
    assert vqa_accuracy("Red bus!", answers) == pytest.approx([0, 0.3, 0.6, 0.9, *[1] * 7][matches])


@pytest.mark.parametrize("count", [0, 1, 9, 11])
def test_it_is_of_ten_people(count):
    with pytest.raises(ValueError, match=f"answers of 10 people, got {count}; score by exact or anls"):
        vqa_accuracy("bus", ["bus"] * count)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Two Cats", "2 cats"),
        ("None", "0"),
        ("it's red, isnt it?", "it 's red isn't it"),
        ("red-blue", "red blue"),
        ("red - blue-green", "red bluegreen"),  # a mark that touches a blank goes everywhere
        ("red -blue-green", "red bluegreen"),
        ("3.14 m.", "3.14 m"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),
        ("ma'am", "ma'am"),
        ("two\tor\nthree", "2 or 3"),
    ],
)
def test_normalisation(text, normalised):
    for official in (False, True):
        assert vqa_normalised(text, official=official) == normalised


def test_half_of_it_keeps_the_s_and_looks_at_groups_of_digits():
    assert vqa_words("It's 1,000 red-blue cats") == "it's 1000 redblue cats"
    assert vqa_words("It's red-blue,green cats") == "it's red blue green cats"


@pytest.mark.parametrize(
    ("text", "right", "official"),
    [
        ("x" + "." * 40, "x", "x" + "." * 8),
        ("im", "i'm", "im"),
        ("ive", "i've", "ive"),
        ("somebodyd", "somebody'd", "somebodyd"),
        ("somebody'd", "somebody'd", "somebodyd"),
    ],
)
def test_bugs_of_the_official_code_are_an_option(text, right, official):
    assert vqa_normalised(text) == right
    assert vqa_normalised(text, official=True) == official
