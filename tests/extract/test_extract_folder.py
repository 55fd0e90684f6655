"""Shards that are whole or not there, and what a folder refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from extracting import read, settings

from stepwell.extract.columns import batch_of
from stepwell.extract.folder import MANIFEST, OutFolder, Totals, check_out
from stepwell.extract.rows import Opened, Row, Shard

SETTINGS = {"what": "ask", "question": "What?", "weights": "abc"}


def folder_in(path: Path, size: int = 4, **changes: Any) -> OutFolder:
    return OutFolder(path, "ask", {**SETTINGS, **changes}, shard_size=size)


def rows_of(count: int, *, mark: str = "") -> list[Row]:
    return [Row(f"{i:03}", None, mark) for i in range(count)]


def batches(shard: Shard, of: int = 3) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Row 002 is bad."""
    rows = iter(shard.rows)
    while part := list(islice(rows, of)):
        bad = ["no picture" if row.id == "002" else "" for row in part]
        looked = [(Opened(row.id, None), f"a{row.id}", why) for row, why in zip(part, bad, strict=True)]
        yield batch_of("ask", looked), sum(map(bool, bad))


def run(folder: OutFolder, rows: list[Row], *, retry_bad: bool = False) -> tuple[list[int], Totals]:
    """Numbers of the shards that were written."""
    totals, numbers = Totals(), []
    folder.check(iter(rows))
    for shard in folder.missing(iter(rows), totals, retry_bad=retry_bad):
        totals.add(folder.write(shard, batches(shard)), is_new=True)
        numbers.append(shard.number)
    return numbers, totals


def test_shards_hold_ranges_of_the_rows_and_are_made_once(tmp_path: Path) -> None:
    written, totals = run(folder_in(tmp_path / "out"), rows_of(10))
    assert written == [0, 1, 2]
    assert totals == Totals(rows=10, bad=1, new=10)
    names = [f"part-{i:05}.parquet" for i in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([MANIFEST, *names])
    assert [pq.read_metadata(tmp_path / "out" / name).num_rows for name in names] == [4, 4, 2]
    frame = read(tmp_path / "out")
    assert [*frame.id] == [row.id for row in rows_of(10)]
    assert [*frame.answer[:3]] == ["a000", "a001", None]
    assert [*frame.error[:4]] == [None, None, "no picture", None]
    written, totals = run(folder_in(tmp_path / "out"), rows_of(10))
    assert written == []
    assert totals == Totals(rows=10, bad=1, new=0)


def test_what_is_not_whole_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    run(folder_in(tmp_path), rows_of(18))
    (tmp_path / "part-00001.parquet").unlink()
    path = tmp_path / "part-00003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "part-00004.parquet").write_bytes(b"")
    kept = (tmp_path / "part-00002.parquet").stat().st_mtime_ns
    written, totals = run(folder_in(tmp_path), rows_of(18))
    assert written == [1, 3, 4]
    assert totals == Totals(rows=18, bad=1, new=10)
    assert (tmp_path / "part-00002.parquet").stat().st_mtime_ns == kept
    assert [*read(tmp_path).id] == [row.id for row in rows_of(18)]


def test_a_shard_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    (shard,) = folder.missing(iter(rows_of(4)), Totals())

    def broken() -> Iterator[tuple[pa.RecordBatch, int]]:
        yield from islice(batches(shard), 1)
        assert len([*tmp_path.glob(".part-00000.*")]) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write(shard, broken())
    with pytest.raises(RuntimeError, match="got 3 rows for its 4"):
        folder.write(shard, islice(batches(shard), 1))
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_drafts_of_killed_runs_go_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    run(folder, rows_of(4))
    for name in (".part-00001.77.parquet", ".hidden", "_notes.md"):
        (tmp_path / name).touch()
    folder.remove_drafts()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".hidden", MANIFEST, "_notes.md", "part-00000.parquet"]


def test_more_rows_at_the_end_go_on_from_the_last_shard(tmp_path: Path) -> None:
    run(folder_in(tmp_path), rows_of(6))
    written, totals = run(folder_in(tmp_path), rows_of(13))
    assert written == [1, 2, 3]
    assert totals == Totals(rows=13, bad=1, new=9)
    assert [*read(tmp_path).id] == [row.id for row in rows_of(13)]


@pytest.mark.parametrize(
    "now",
    [
        [Row("other", None), *rows_of(10)[1:]],
        rows_of(10)[1:],
        rows_of(10, mark="1"),
        rows_of(9),
        rows_of(8),
        rows_of(2),
        [],
    ],
    ids=["renamed", "shifted", "other marks", "one less", "a shard less", "few", "none"],
)
def test_other_rows_than_before_are_refused_and_nothing_is_written(tmp_path: Path, now: list[Row]) -> None:
    run(folder_in(tmp_path), rows_of(10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"part-0000\d\.parquet holds other pictures than are there now"):
        run(folder_in(tmp_path), now)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_are_compared_before_a_missing_shard_is_made(tmp_path: Path) -> None:
    run(folder_in(tmp_path), rows_of(10))
    (tmp_path / "part-00000.parquet").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rows = rows_of(10)
    rows.insert(1, Row("between", None))
    with pytest.raises(ValueError, match=r"part-00001\.parquet holds other pictures"):
        run(folder_in(tmp_path), rows)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_manifest_stays_that_of_the_first_run(tmp_path: Path) -> None:
    OutFolder(tmp_path, "ask", SETTINGS, shard_size=4, about={"pictures": ["a"]})
    before = (tmp_path / MANIFEST).read_text()
    OutFolder(tmp_path, "ask", SETTINGS, shard_size=4, about={"pictures": ["b"]})
    assert (tmp_path / MANIFEST).read_text() == before


def test_shards_with_errors_are_made_again_where_that_is_asked_for(tmp_path: Path) -> None:
    run(folder_in(tmp_path), rows_of(10))
    assert run(folder_in(tmp_path), rows_of(10), retry_bad=True) == ([0], Totals(rows=10, bad=1, new=4))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(folder_in(tmp_path), rows_of(4))
    assert settings(tmp_path) == {**SETTINGS, "shard_size": 4}
    with pytest.raises(ValueError, match=r'question was "What\?" and is "Who\?"'):
        folder_in(tmp_path, question="Who?")
    with pytest.raises(ValueError, match="shard_size was 4 and is 5"):
        folder_in(tmp_path, size=5)
    with pytest.raises(ValueError, match="new was null and is 1"):
        folder_in(tmp_path, new=1)
    folder_in(tmp_path / "nested", limits={"max_side": 100 * "9", "max_seconds": 1})
    with pytest.raises(ValueError, match=r"other settings: limits\.max_seconds was 1 and is 2;"):
        folder_in(tmp_path / "nested", limits={"max_side": 100 * "9", "max_seconds": 2})
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        folder_in(tmp_path)


def test_shards_of_another_run_are_refused(tmp_path: Path) -> None:
    run(folder_in(tmp_path / "a"), rows_of(4))
    folder = folder_in(tmp_path / "b", question="Who?")
    (tmp_path / "a" / "part-00000.parquet").rename(tmp_path / "b" / "part-00000.parquet")
    with pytest.raises(ValueError, match="is of another run"):
        run(folder, rows_of(4))


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / MANIFEST).write_text("{")
    for name, words in (("file", "is a file"), ("full", "holds other files"), ("damaged", "cannot be read")):
        with pytest.raises(ValueError, match=words):
            folder_in(tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["a.txt"]
    check_out(tmp_path / "empty")
    check_out(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    folder_in(tmp_path / "empty")


def test_rows_are_listed_a_shard_at_a_time(tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[Row]:
        nonlocal taken
        while True:
            taken += 1
            yield Row(str(taken), None)

    shards = folder_in(tmp_path).missing(endless(), Totals())
    assert [next(shards).number for _ in range(3)] == [0, 1, 2]
    assert taken == 12


def test_row_groups_are_written_before_a_shard_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell.extract.folder._GROUP", 1)
    run(folder_in(tmp_path, size=9), rows_of(9))
    assert pq.read_metadata(tmp_path / "part-00000.parquet").num_row_groups == 3


def test_names_may_be_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    assert run(folder_in(path), rows_of(5)) == ([0, 1], Totals(rows=5, bad=1, new=5))
    assert run(folder_in(path), rows_of(5)) == ([], Totals(rows=5, bad=1))
