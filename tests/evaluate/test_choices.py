"""Which letter an answer names: ours, ScienceQA's and SEED's readers on texts that they read differently."""

from __future__ import annotations

import pytest

from stepwell.evaluate.choices import choice, choice_letter, right_letter, with_choices

CHOICES = ("dog", "fox", "grey wolf", "bird")


@pytest.mark.parametrize(
    ("text", "ours", "scienceqa"),
    [
        ("B", "B", "B"),
        (" b\n", "B", None),
        ("B.", "B", None),
        ("(B)", "B", None),
        ("**B**", "B", None),
        ("B. fox", "B", "B"),
        ("B) fox", "B", None),
        ("B: fox", "B", None),
        ("The answer is B", "B", None),
        ("The answer is B.", "B", "B"),
        ("I think the answer is (b).", "B", None),
        ("Answer: B", "B", None),
        ("The answer is A. The answer is B.", None, None),
        ("The answer is B. So the answer is B.", "B", "B"),
        ("Grey  Wolf.", "C", None),
        ("A fox is shown", None, None),
        ("the answer is a dog", None, None),
        ("A or B", None, None),
        ("A, B", None, None),
        ("Bear", None, None),
        ("", None, None),
        ("Because", None, None),
    ],
)
def test_letters(text, ours, scienceqa):
    assert choice_letter(text, CHOICES) == ours
    assert choice_letter(text, CHOICES, official="scienceqa") == scienceqa


def test_the_right_choice_is_told_by_letter_or_text():
    assert [right_letter(answer, CHOICES) for answer in ("B", "b ", "FOX", "grey wolf")] == [
        "B",
        "B",
        "B",
        "C",
    ]
    assert right_letter("D") == "D"
    for answer in ("E", "cat", "", "AB"):
        with pytest.raises(ValueError, match="the right choice is A, B, C, D or the text of one choice, got"):
            right_letter(answer, CHOICES)


def test_a_choice_is_right_or_wrong():
    assert choice("C.", "grey wolf", CHOICES) == 1
    assert choice("C.", "dog", CHOICES) == 0
    assert choice("no idea", "dog", CHOICES) == 0
    assert choice("C.", "C", CHOICES, official="scienceqa") == 0
    assert [choice(text, "C", CHOICES, official="seed") for text in ("C", "c", "C.")] == [1, 0, 0]


def test_choices_are_shown_once():
    question = with_choices("What is it?", CHOICES)
    assert question == "What is it?\nA. dog\nB. fox\nC. grey wolf\nD. bird"
    assert with_choices(question, CHOICES) == question
    assert with_choices("What is it?", ()) == "What is it?"
