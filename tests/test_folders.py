"""A folder's settings, and errors, in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepwell.folders import locked, one_line, read_config, whole_file, write_whole


def test_settings_are_read_and_none_are_none(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_config(tmp_path) == {"a": 1}


@pytest.mark.parametrize("content", [b"{", b"[]", b"1", b"\xff"])
def test_what_is_no_json_object_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^.*config\.json cannot be read: [^\n]*$"):
        read_config(tmp_path)


def test_an_error_is_one_short_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError("ab" * 200)) == "ab" * 100
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_whole(path, "before")

    def half() -> None:
        with whole_file(path) as draft:
            assert draft.suffix == ".png"
            draft.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        half()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert path.read_text() == "before"
    write_whole(path, "after")
    assert path.read_text() == "after"


def test_a_folder_is_worked_on_by_one(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=r"another process works on .*: wait for its end, or"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        assert not [*tmp_path.iterdir()]


def test_where_there_are_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, and on some network file systems."""
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path):
        pass
