"""Questions from a file: what a line means, what is refused, and that one bad line spoils no other."""

from __future__ import annotations

import json

import pytest

from stepwell.models.ask_file import answer_lines, read_question_lines


@pytest.fixture
def folder(draw, tmp_path):
    for i in range(3):
        draw(90, 60, i).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def test_answers_are_those_of_asking_singly_and_fields_are_kept(assistant, folder):
    path = write(
        folder,
        {"image": "0.png", "question": "What is it?", "id": 7},
        "",
        {"image": ["1.png", "2.png"], "question": ["Which?", "Why?"]},
        {"image": "2.png", "question": "What is it?"},
    )
    lines = read_question_lines(path)
    what, last = (ask(assistant, folder, name, "What is it?") for name in "02")
    for batch_size in (1, 2, 8):
        answers = list(answer_lines(assistant, lines, max_new_tokens=5, batch_size=batch_size))
        assert answers == [
            {"image": "0.png", "question": "What is it?", "id": 7, "answer": what},
            {
                "image": ["1.png", "2.png"],
                "question": ["Which?", "Why?"],
                "answer": [ask(assistant, folder, "12", text) for text in ("Which?", "Why?")],
            },
            {"image": "2.png", "question": "What is it?", "answer": last},
        ]


def ask(assistant, folder, names, question):
    return assistant.ask([folder / f"{name}.png" for name in names], question, max_new_tokens=5)


def test_what_cannot_be_answered_has_an_error_and_the_others_go_on(assistant, folder):
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    path = write(
        folder,
        {"image": "missing.png", "question": "?"},
        {"image": "0.png", "question": "?"},
        {"image": "cut.png", "question": "?"},
        {"image": ["0.png"] * 300, "question": "?"},
    )
    missing, answered, cut, too_many = answer_lines(assistant, read_question_lines(path), max_new_tokens=3)
    assert missing["error"] == f"{folder / 'missing.png'}: no such file or directory"
    assert answered["answer"] == assistant.ask(folder / "0.png", "?", max_new_tokens=3)
    assert "answer" not in cut
    assert "show smaller or fewer images" in too_many["error"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ({"image": "0.png"}, "line 2 needs a text, or a list of them, as its question"),
        ({"image": "0.png", "question": " "}, "as its question"),
        ({"image": "0.png", "question": []}, "as its question"),
        ({"image": [3], "question": "?"}, "as its image"),
        ({"question": "?"}, "as its image"),
    ],
)
def test_lines_that_are_no_questions_are_refused_by_number(folder, line, reason):
    path = write(folder, {"image": "0.png", "question": "?"}, line)
    with pytest.raises(ValueError, match=reason) as caught:
        read_question_lines(path)
    assert "\n" not in str(caught.value)
    assert '{"image": "a.jpg", "question": "What is it?"}' in str(caught.value)


def test_files_that_hold_nothing_or_no_text_are_refused(folder):
    with pytest.raises(ValueError, match="holds no questions"):
        read_question_lines(write(folder, "", " "))
    path = write(folder)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_question_lines(path)


def test_files_of_windows_and_of_other_ends_of_lines(folder):
    """JSON text may hold U+2028 as it is, which Python takes for the end of a line."""
    text = "one\u2028two\x85three"
    line = json.dumps({"image": "0.png", "question": text}, ensure_ascii=False)
    path = folder / "questions.jsonl"
    path.write_bytes("\r\n".join([line, "", line, ""]).encode())
    assert [entry.questions[0][1] for entry in read_question_lines(path)] == [text, text]


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder):
    path = write(folder, "\ufeff" + json.dumps({"image": "0.png", "question": "?"}))
    (line,) = read_question_lines(path)
    assert line.questions == [([folder / "0.png"], "?")]


def test_what_an_earlier_run_found_is_left_out(assistant, folder):
    failed = {"image": "0.png", "question": "?", "error": "no such file"}
    missing = {"image": "missing.png", "question": "?", "answer": "it says"}
    lines = read_question_lines(write(folder, failed, missing))
    found = list(answer_lines(assistant, lines, max_new_tokens=3))
    assert found[0].keys() == {"image", "question", "answer"}
    assert found[1].keys() == {"image", "question", "error"}
