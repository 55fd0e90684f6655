"""Scores of reading."""

from __future__ import annotations

import pytest
from PIL import Image

from stepwell.reader.page import Line, PageSample
from stepwell.reader.score import character_accuracy, height_band, read_samples


class Parrot:
    """Answers with what stands behind the last colon of a question."""

    def ask(self, image, question, *, max_new_tokens):
        assert "<image>" not in question
        return question.rsplit(":", 1)[1]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("RM 8.50", "rm8.50", 1.0),
        ("", "ABC", 0.0),
        ("", "", 1.0),
        ("ABCD", "AB", 0.5),
    ],
)
def test_character_accuracy_is_the_share_of_the_edit_distance(answer, reference, expected):
    assert character_accuracy(answer, reference) == pytest.approx(expected)


def test_heights_fall_into_bands():
    assert [height_band(h) for h in (3, 8, 10.9, 13, 14, 24.5, 25, 80)] == [
        "<8",
        "8-10",
        "8-10",
        "11-13",
        "14-18",
        "19-24",
        "25+",
        "25+",
    ]


def test_answers_are_grouped_by_the_height_of_what_is_read():
    small, large = (Line(text="AB", box=(0, 0, 20, h), edges=(0, 10, 20)) for h in (9, 30))
    texts = ["<image>\nRead [0]:AB", "AB", "Read [1]:AX", "AB", "total:1", "2"]
    sample = PageSample(
        images=(Image.new("RGB", (40, 40)),),
        messages=tuple({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)),
        spelled=(small, large, large),
    )
    scores = read_samples(Parrot(), [sample])
    assert (scores["8-10"].count, scores["8-10"].exact, scores["8-10"].characters) == (1, 1.0, 1.0)
    assert (scores["25+"].exact, scores["25+"].characters) == (0.0, 0.5)
    assert scores["fields"].exact == 0.0
    assert scores["all"].count == 3
    assert scores["all"].exact == pytest.approx(1 / 3)


def test_text_without_a_image_cannot_be_read():
    with pytest.raises(ValueError, match="measured on images"):
        read_samples(Parrot(), [PageSample(messages=())])
