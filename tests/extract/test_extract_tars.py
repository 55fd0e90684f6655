"""Pictures in tars, also in those that somebody made to do harm."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from extracting import picture, png

from stepwell.extract.opening import opened
from stepwell.extract.rows import Part
from stepwell.extract.tars import HEADER, tar_rows
from stepwell.images.limits import DEFAULT_LIMITS, ImageLimits


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_found_where_they_lie(tmp_path: Path, form: int) -> None:
    long = "0/" + "x" * 90 + ".png" if form == tarfile.USTAR_FORMAT else "x" * 180 + ".png"
    path = tar_of(
        tmp_path / "a.tar",
        member("0001.png", png(1)),
        member("0001.txt", b"a caption"),
        member("folder.png", type=tarfile.DIRTYPE),
        member("._0002.png", png(9)),
        member("deep/0002.JPG", png(2)),
        member(long, png(3)),
        form=form,
    )
    rows = [*tar_rows(path)]
    assert [row.id for row in rows] == [f"{path}/0001.png", f"{path}/deep/0002.JPG", f"{path}/{long}"]
    for row, (size, pixels), seed in zip(rows, opened(rows, DEFAULT_LIMITS), (1, 2, 3), strict=True):
        assert size == (24, 20)
        assert pixels == picture(seed).tobytes()
        assert isinstance(row.place, Part)


def test_names_are_no_paths_and_links_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(5))
    (tmp_path / "in").mkdir()
    path = tar_of(
        tmp_path / "in" / "a.tar",
        member("../../secret.png", png(1)),
        member(f"{tmp_path}/secret.png", png(2)),
        member("soft.png", type=tarfile.SYMTYPE, linkname="../secret.png"),
        member("hard.png", type=tarfile.LNKTYPE, linkname="../../secret.png"),
        member("device.png", type=tarfile.CHRTYPE),
        member("pipe.png", type=tarfile.FIFOTYPE),
    )
    rows = [*tar_rows(path)]
    found = opened(rows, DEFAULT_LIMITS)
    assert [one[1] for one in found[:2]] == [picture(1).tobytes(), picture(2).tobytes()]
    assert [row.error for row in rows[2:]] == ["no plain file in the tar, but a link or the like"] * 4
    assert found[2:] == [row.error for row in rows[2:]]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in", "secret.png"]


def test_a_member_past_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.tar"
    size = 2**26
    info, _ = member("big.png", size=size)
    info.size = size
    with path.open("wb") as file:  # no more than its header is on the disk
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + size + 1024)
    (row,) = tar_rows(str(path))
    assert row.place == Part(str(path), 512, size)
    tracemalloc.start()
    (found,) = opened([row], ImageLimits(max_bytes=1000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "larger than 1,000 bytes" in str(found)
    assert most < 2**20


def damaged(path: Path, raw: bytes) -> list[Any]:
    path.write_bytes(raw)
    return [*tar_rows(str(path))]


def test_what_is_damaged_or_cut_off_is_a_last_row_that_says_where(tmp_path: Path) -> None:
    whole = Path(tar_of(tmp_path / "a.tar", *(member(f"{i}.png", png(i)) for i in range(3)))).read_bytes()
    second = 512 + -(-len(png(0)) // 512) * 512
    third = second + 512 + -(-len(png(1)) // 512) * 512
    path = tmp_path / "b.tar"
    for raw, good, where in (
        (whole[:third] + b"x" * 512 + whole[third + 512 :], 2, third),
        (whole[: third + 100], 2, third),
        (whole[:third], 2, third),
        (b"\x1f\x8b" + whole, 0, 0),
        (b"", 0, 0),
        (whole + whole, 3, third + 512 + -(-len(png(2)) // 512) * 512),
        (b"no tar at all" * 100, 0, 0),
    ):
        rows = damaged(path, raw)
        assert [row.place is None for row in rows] == [False] * good + [True], raw[:20]
        assert f"from byte {where} on" in rows[-1].error
        assert rows[-1].id == str(path)
    cut = damaged(path, whole[: third + 512 + 40])
    errors = opened(cut, DEFAULT_LIMITS)[2:]
    assert errors[0] == "the tar is cut off in the middle of it"


def with_size(info: tarfile.TarInfo, field: bytes) -> bytes:
    """Its header with another size, and the sum that fits."""
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = field
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_negative_size_does_not_lead_back_for_ever(tmp_path: Path, kind: bytes) -> None:
    first = tar_of(tmp_path / "a.tar", member("0.png", png(0)))
    info, _ = member("1.png", type=kind)
    negative = b"\xff" * 10 + b"\xfc\x00"  # -1024
    raw = Path(first).read_bytes()[: 512 + -(-len(png(0)) // 512) * 512] + with_size(info, negative)
    rows = damaged(tmp_path / "b.tar", raw + bytes(2048))
    assert [row.place is None for row in rows] == [False, True]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_past_the_limit_are_not_read(tmp_path: Path, kind: bytes) -> None:
    info, _ = member("0.png", type=kind)
    info.size = 64 * HEADER
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(80 * HEADER)
    (row,) = tar_rows(str(path))
    assert f"headers of over {HEADER} bytes" in row.error


def test_headers_of_one_member_are_counted_together(tmp_path: Path) -> None:
    long = b"%d comment=%s\n" % (HEADER // 2 + 16, b"x" * (HEADER // 2))
    assert len(long) == HEADER // 2 + 16
    info, _ = member("0.png", type=tarfile.XHDTYPE)
    info.size = len(long)
    header = info.tobuf(tarfile.GNU_FORMAT) + long + bytes(-len(long) % 512)
    first = tar_of(tmp_path / "a.tar", member("0.png", png(0)))
    (row,) = damaged(tmp_path / "b.tar", header + Path(first).read_bytes())
    assert row.place is not None
    (row,) = damaged(tmp_path / "c.tar", 2 * header + Path(first).read_bytes())
    assert f"headers of over {HEADER} bytes" in row.error


def test_a_chain_of_headers_ends(tmp_path: Path) -> None:
    info, _ = member("0.png", type=tarfile.XHDTYPE)
    (row,) = damaged(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) * 5000)
    assert row.place is None


def test_no_member_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "a.tar", *(member(f"{i}.png", b"x") for i in range(50)))
    made, tarfile_open = [], tarfile.open

    def kept(*arguments: Any, **options: Any) -> Any:
        made.append(tarfile_open(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(tarfile, "open", kept)
    rows = tar_rows(path)
    for _ in range(40):
        next(rows)
    assert len(made[0].members) == 0
    assert os.path.exists(path)
