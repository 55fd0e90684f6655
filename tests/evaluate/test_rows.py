"""Rows as people write them, and what is wrong with others, told by line."""

from __future__ import annotations

import json

import pytest

from stepwell.evaluate.rows import BadRow, read_rows

ROW = {"image": "0.png", "question": "What?", "answers": ["a cat"]}


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({}, "answers", ("a cat",)),
        ({"answers": "a cat"}, "answers", ("a cat",)),
        ({"answers": None, "answer": "a cat"}, "answers", ("a cat",)),
        ({"answers": [], "label": "yes"}, "answers", ("yes",)),
        ({"answers": 7}, "answers", ("7",)),
        ({"answers": [1.5, "x"]}, "answers", ("1.5", "x")),
        ({"answers": [""]}, "answers", ("",)),
        ({"answers": [{"answer": "a", "answer_confidence": "yes"}, {"answer": "b"}]}, "answers", ("a", "b")),
        ({"answers": 1, "choices": ["dog", "2"]}, "answers", ("B",)),
        ({"answers": "1", "choices": ["dog", "2"]}, "answers", ("1",)),
        ({"options": {"B": "fox", "A": "dog"}}, "choices", ("dog", "fox")),
        ({"question": "", "text": "Who?"}, "question", "Who?"),
        ({"category": "popular"}, "type", "popular"),
        ({"type": 3}, "type", "3"),
        ({"id": 0}, "question_id", 0),
        ({"bbox": [0, 1, 2, 3.5]}, "box", (0, 1, 2, 3.5)),
        ({"box": "[0, 1, 2, 3.5]", "answers": None}, "box", (0, 1, 2, 3.5)),
        ({"images": ["a.png", "b.png"], "image": None}, "names", ("a.png", "b.png")),
    ],
)
def test_fields_under_names_that_are_used(write, fields, name, expected):
    (row,) = read_rows(write(ROW | fields))
    assert getattr(row, name) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ([1], "a row is an object, got a list"),
        ({**ROW, "image": None}, "it has no image"),
        ({**ROW, "image": 3}, "its image is no text"),
        ({**ROW, "question": " "}, "one question"),
        ({**ROW, "question": ["a", "b"]}, "one question"),
        ({**ROW, "answers": []}, "it has no answers"),
        ({**ROW, "answers": [True]}, "an answer is a text or a number, got a bool"),
        ({**ROW, "answers": [{"text": "a"}]}, "got a NoneType"),
        ({**ROW, "answers": 2, "choices": ["a", "b"]}, "the right choice is 0 to 1, got 2"),
        ({**ROW, "choices": {"a": "b"}}, "they run from A on"),
        ({**ROW, "choices": "ab"}, "its choices are a list"),
        ({**ROW, "box": [1, 2, 3]}, r"a box is \[left, top, right, bottom\]"),
        ({**ROW, "box": [1, 2, 3, "4"]}, "a box is"),
        ({**ROW, "box": [1, 2, 3, float("nan")]}, "a box is"),
        ({**ROW, "box": [1, 2, 3, 10**400]}, "a box is"),
        ({**ROW, "question": "\ud800"}, "half a character"),
    ],
)
def test_a_bad_row_is_told_by_its_line_and_spoils_no_other(write, row, reason):
    first, bad, last = read_rows(write(ROW, "", row, ROW))
    assert (first.where, last.where, last.entry) == ("line 1", "line 4", 2)
    assert isinstance(bad, BadRow)
    assert (bad.entry, bad.where) == (1, "line 3")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad.reason)
    assert "\n" not in bad.reason


def test_images_start_from_the_file_or_from_a_folder(write, folder):
    data = write(ROW)
    assert read_rows(data)[0].images == (folder / "0.png",)
    assert read_rows(data, images="elsewhere")[0].images[0].as_posix() == "elsewhere/0.png"
    folder_above = folder.parent / "images"
    folder_above.mkdir()
    (folder_above / "1.png").touch()
    assert read_rows(write({**ROW, "image": "images/1.png"}))[0].images == (folder_above / "1.png",)
    (folder / "images").mkdir()
    (folder / "images" / "1.png").touch()
    assert read_rows(write({**ROW, "image": "images/1.png"}))[0].images == (folder / "images" / "1.png",)
    assert read_rows(write({**ROW, "image": "a" * 300}))[0].images == (folder / ("a" * 300),)
    assert read_rows(write({**ROW, "image": "https://a/b.png"}))[0].images == ("https://a/b.png",)


def test_lists_marks_and_limits(folder):
    path = folder / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([ROW] * 3).encode())
    assert [row.where for row in read_rows(path, limit=2)] == ["entry 0", "entry 1"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no questions; write"):
        read_rows(path)
