"""Pictures opened ahead, in order, whatever becomes of one of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from extracting import picture, pictures_in, png
from PIL import Image

from stepwell.extract.opening import Decoded, Here, Lost, Processes, opened, opened_in_order, rows_of_a_task
from stepwell.extract.rows import Part, Row
from stepwell.images.limits import DEFAULT_LIMITS, TILED_LIMITS


def rows_of(folder: Path, count: int) -> list[Row]:
    return [Row(name, name) for name in pictures_in(folder, count)]


class Fragile:
    """A piece with a picture of these is lost."""

    piece, ahead = 4, 3

    def __init__(self, *fatal: str) -> None:
        self.fatal = fatal
        self.submitted: list[list[str]] = []
        self.flaky = 0

    def submit(self, rows: Sequence[Row]) -> Sequence[Row]:
        self.submitted.append([row.id for row in rows])
        return rows

    def result(self, task: Sequence[Row]) -> list[Decoded]:
        self.flaky -= 1
        if self.flaky == 0 or {row.id for row in task} & {*self.fatal}:
            raise Lost("it is gone")
        return opened(task, DEFAULT_LIMITS)


def test_each_row_comes_once_in_order_and_what_is_wrong_with_it_is_its_own(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "p", 6)
    (tmp_path / "cut.png").write_bytes(png()[:200])
    bad = [
        Row("cut", str(tmp_path / "cut.png")),
        Row("gone", str(tmp_path / "gone.png")),
        Row("folder", str(tmp_path)),
        Row("nul", "a\0b.png"),
        Row("told", None, error="no plain file"),
        Row("part", Part(rows[0].id, 10**6, 100)),
        Row("text", b"no picture at all"),
    ]
    mixed = [*rows[:2], *bad, *rows[2:]]
    found = [*opened_in_order(mixed, Here(DEFAULT_LIMITS))]
    assert [one.id for one in found] == [row.id for row in mixed]
    errors = [one.error for one in found if one.image is None]
    assert len(errors) == len(bad)
    assert errors[0].startswith("damaged or unsupported PNG")
    assert errors[1:3] == ["no such file", "a folder, not a picture"]
    assert errors[4:6] == ["no plain file", "the tar is cut off in the middle of it"]
    good = [one for one in found if one.image is not None]
    assert [one.image.tobytes() for one in good if one.image] == [picture(i).tobytes() for i in range(6)]


def test_no_more_is_taken_than_is_on_its_way(tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[Row]:
        nonlocal taken
        while True:
            taken += 1
            yield Row(str(taken), png())

    openers = Fragile()
    pictures = opened_in_order(endless(), openers)
    for _ in range(40):
        next(pictures)
    assert taken <= 40 + openers.piece * openers.ahead


def test_pictures_that_may_be_large_are_opened_one_by_one() -> None:
    assert [rows_of_a_task(limits, most=9) for limits in (DEFAULT_LIMITS, TILED_LIMITS)] == [9, 1]
    assert [Processes(1, limits).piece for limits in (DEFAULT_LIMITS, TILED_LIMITS)] == [4, 1]


def test_of_a_lost_piece_each_row_is_tried_alone(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 10)
    openers = Fragile(rows[5].id)
    found = [*opened_in_order(rows, openers)]
    assert [one.id for one in found] == [row.id for row in rows]
    assert [one.error for one in found] == [""] * 5 + ["it is gone"] + [""] * 4
    assert openers.submitted[-4:] == [[row.id] for row in rows[4:8]]


def test_a_row_that_was_lost_by_chance_is_tried_once_more(tmp_path: Path) -> None:
    openers = Fragile()
    openers.flaky = 3
    found = [*opened_in_order(rows_of(tmp_path, 9), openers)]  # the last piece is of one row
    assert [one.error for one in found] == [""] * 9


@pytest.mark.slow
def test_processes_open_what_this_one_would(tmp_path: Path) -> None:
    rows = [*rows_of(tmp_path, 30), Row("gone", str(tmp_path / "gone.png"))]
    with Processes(2, DEFAULT_LIMITS) as openers:
        there = [*opened_in_order(rows, openers)]
    here = [*opened_in_order(rows, Here(DEFAULT_LIMITS))]
    assert [(one.id, one.error) for one in there] == [(one.id, one.error) for one in here]
    assert [one.image and one.image.tobytes() for one in there] == [
        one.image and one.image.tobytes() for one in here
    ]


@pytest.mark.slow
def test_a_process_that_is_gone_takes_no_picture_along(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 40)
    with Processes(1, DEFAULT_LIMITS) as openers:
        pictures = opened_in_order(rows, openers)
        first = next(pictures)
        for child in children():
            os.kill(child, signal.SIGKILL)
        time.sleep(1)
        rest = [*pictures]
    assert [one.id for one in (first, *rest)] == [row.id for row in rows]
    assert [one.error for one in (first, *rest)] == [""] * 40


@pytest.mark.slow
def test_a_picture_that_takes_too_long_is_a_row_with_an_error(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (5900, 5900)).save(large)
    rows = [*rows_of(tmp_path / "p", 2), Row("large", str(large))]
    with Processes(1, DEFAULT_LIMITS, seconds=0.02) as openers:
        [*opened_in_order(rows[:1], openers)]  # begins the process
        found = [*opened_in_order(rows[2:], openers)]
    assert found[0].error == "opening it takes over 0.02 seconds"


def children() -> list[int]:
    """That open pictures; multiprocessing has one of its own, which tracks what is shared."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command: Any = (entry / "cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and "spawn_main" in command:
            found.append(int(entry.name))
    return found
