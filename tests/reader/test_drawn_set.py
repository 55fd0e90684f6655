"""Drawn pages as files: what is written is what was drawn, and can be read by all that reads such sets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from stepwell import cli
from stepwell.data.conversations import Conversations
from stepwell.evaluate.rows import Row, read_rows
from stepwell.reader.drawn import DrawnPages
from stepwell.reader.drawn_set import write_drawn
from stepwell.reader.text_lines import TextLines

PAGES = {"count": 4, "seed": 7, "sides": (300, 400), "aspect": (0.8, 2.0), "text": (10, 24)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "set"
    write_drawn(DrawnPages(**PAGES), folder, reads=3, view=300)
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_are_the_pages(folder):
    pages = DrawnPages(**PAGES)
    for index in range(4):
        with Image.open(folder / f"images/{index:06}.png") as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(pages.drawn(index).image))


def test_questions_name_text_that_stands_there(folder):
    pages, questions = DrawnPages(**PAGES), lines_of(folder / "questions.jsonl")
    assert len({each["question_id"] for each in questions}) == len(questions)
    reads = [each for each in questions if each["type"].startswith("read ")]
    assert 4 < len(reads) <= 12
    for each in reads:
        page = pages.drawn(int(each["image"][7:13]))
        (width, height), (left, top, right, bottom) = page.image.size, each["box"]
        middle = (left + right) / 2 * width, (top + bottom) / 2 * height
        number = next(
            i
            for i, line in enumerate(page.lines)
            if line.box[0] < middle[0] < line.box[2] and line.box[1] < middle[1] < line.box[3]
        )
        assert each["answers"] == [page.lines[number].text]
        em = round(page.ems[number] * min(1, 300 / max(page.image.size)))
        sizes = {"read up to 10 px": (0, 10), "read 11-13 px": (11, 13), "read 14-18 px": (14, 18)}
        least, most = sizes.get(each["type"], (19, 99))
        assert least <= em <= most
    fields = {each["image"]: each["fields"] for each in lines_of(folder / "fields.jsonl")}
    for each in questions:
        if each["type"] in ("company", "date", "total", "address"):
            assert each["answers"] == [fields[each["image"]][each["type"]]]


def test_all_that_reads_such_sets_reads_it(folder):
    rows = read_rows(folder / "questions.jsonl")
    assert len(rows) == len(lines_of(folder / "questions.jsonl"))
    assert all(isinstance(row, Row) and row.images[0].is_file() for row in rows)
    conversations = Conversations(folder / "conversations.json")
    assert len(conversations[0].messages) == 2 * sum(row.names == ("images/000000.png",) for row in rows)
    window = TextLines(folder / "lines.json", images=folder, fields=folder / "fields.jsonl")[0]
    assert window.lines


def test_a_set_is_written_whole_and_over_nothing(folder, tmp_path, monkeypatch):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(FileExistsError, match="is not written over"):
        write_drawn(DrawnPages(**PAGES), folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    monkeypatch.setattr(DrawnPages, "drawn", lambda self, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_drawn(DrawnPages(**PAGES), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command_draws_the_same_set_again(tmp_path, capsys):
    command = ["draw", str(tmp_path / "a"), "--count", "2", "--seed", "7", "--sides", "300", "320"]
    assert cli.main([*command, "--text", "10", "16", "--held-out"]) == 0
    assert capsys.readouterr().out == f"drawn: 2 pages in {tmp_path / 'a'}\n"
    command[1] = str(tmp_path / "b")
    assert cli.main([*command, "--text", "10", "16", "--held-out"]) == 0
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--kind", "poem"], "unknown kind of page 'poem'"),
        (["--sides", "300", "200"], "sides are the least and the most, got 300 and 200"),
        (["--text", "40", "300", "--sides", "320", "320"], "text of 300 px does not fit a page"),
        (["--aspect", "1", "inf"], "aspect are the least and the most"),
        (["--sides", "3000", "3000"], "up to 2000 px long"),
        (["--fonts", "nowhere"], "nowhere"),
    ],
)
def test_wrong_settings_are_told_in_a_line(tmp_path, capsys, options, complaint):
    assert cli.main(["draw", str(tmp_path / "a"), "--count", "1", *options]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_the_folder_one_is_in_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["draw", ".", "--count", "1"]) == 2
    assert "name a new folder: . is the one you are in" in capsys.readouterr().err
