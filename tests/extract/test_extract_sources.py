"""What is named, as rows: order, number, what comes once, and that no list of it is made."""

from __future__ import annotations

import base64
import os
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from extracting import picture, pictures_in, png

from stepwell.data.image_folder import images_below
from stepwell.extract.opening import opened
from stepwell.extract.parquet_rows import with_pictures
from stepwell.extract.rows import Cell, Row, digest_of
from stepwell.extract.sources import Source
from stepwell.images.limits import DEFAULT_LIMITS
from stepwell.images.open import open_image

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(source: Source) -> list[str]:
    return [row.id for row in source.rows()]


def touched(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_a_folder_comes_in_the_order_of_the_other_commands() -> None:
    touched("p/b.png", "p/a.b/z.JPG", "p/a/c.webp", "p/a.png", "p/B.gif", "p/.hidden/x.png", "p/.x.png")
    touched("p/notes.txt", "p/a/deep/er/1.tiff")
    os.symlink("a", "p/linked")
    assert ids(Source(["p"])) == [str(path) for path in images_below(Path("p"))]
    assert len(ids(Source(["p"]))) == 6


def test_what_is_named_twice_or_lies_in_a_named_folder_comes_once() -> None:
    touched("p/a.png", "p/b.png", "q.png")
    assert ids(Source(["q.png", "p/b.png", "p", "./q.png", "p/*.png"])) == ["q.png", "p/a.png", "p/b.png"]
    assert ids(Source(["p/*.png", "q.png"])) == ["p/a.png", "p/b.png", "q.png"]
    assert ids(Source([Path("p/b.png"), "p/a.png"])) == ["p/b.png", "p/a.png"]


def test_a_list_starts_from_its_own_folder_and_names_what_is_not_there() -> None:
    touched("lists/a.png")
    Path("lists/list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n\n  gone.png\n\xff.png\n")
    source = Source(listed="lists/list.txt")
    assert ids(source) == ["a.png", "gone.png", r"\udcff.png"]
    assert source.count() == 3
    assert next(row.place for row in source.rows()) == str(Path("lists/a.png").absolute())


def test_counts_are_those_of_the_rows_where_they_are_known() -> None:
    pictures_in(Path("p"), 3)
    pq.write_table(pa.table({"image": [png(), None]}), "two.parquet")
    source = Source(["p", "two.parquet"])
    assert source.count() == len(ids(source)) == 5


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["gone"], "no such file: gone"),
        (["*.bmp"], r"no such file: \*\.bmp"),
        (["https://a.org/a.png"], "not fetched from the network"),
        (["empty"], "no pictures in empty$"),
        (["archives"], r"no pictures in archives; .* 'archives/\*\.tar'"),
        (["x.tar.gz"], "compressed.* plain .tar"),
        (["text.parquet"], "no Parquet file"),
        (["twice.parquet"], "has several columns 'image'"),
        (["other.parquet"], "no column 'image' of pictures, but label: .*--column"),
        (["numbers.parquet"], "pictures are bytes, paths .* holds int64"),
    ],
)
def test_what_holds_no_pictures_is_refused_before_anything_begins(names: list[str], words: str) -> None:
    touched("empty/notes.txt", "archives/0.tar", "x.tar.gz")
    Path("text.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"label": [1]}), "other.parquet")
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["image", "image"]), "twice.parquet")
    pq.write_table(pa.table({"image": [1]}), "numbers.parquet")
    with pytest.raises(ValueError, match=words):
        Source(names)


def test_a_column_wants_a_parquet_file() -> None:
    touched("a.png")
    with pytest.raises(ValueError, match="column 'scan' is of Parquet files, and none is named"):
        Source(["a.png"], column="scan")


def test_an_empty_list_is_refused() -> None:
    Path("list.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"no pictures in list\.txt"):
        Source(listed="list.txt")
    with pytest.raises(ValueError, match="no such file"):
        Source(listed="gone.txt")


def test_folders_are_looked_into_when_their_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    touched(*(f"p/{i}/a.png" for i in range(9)))
    source, looked, scandir = Source(["p"]), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
    assert len([*islice(source.rows(), 2)]) == 2
    assert looked == ["p", "p/0", "p/1"]


def test_lists_are_read_as_far_as_they_are_asked() -> None:
    """What is added meanwhile is seen at the end."""
    Path("list.txt").write_text("a.png\n" * 20_000)
    rows = Source(listed="list.txt").rows()
    assert next(rows).id == "a.png"
    with Path("list.txt").open("a") as file:
        file.write("b.png\n")
    assert [row.id for row in rows][-1] == "b.png"


def test_a_list_of_powershell_and_names_that_no_file_can_have() -> None:
    Path("list.txt").write_text("größe.png\r\nb.png\r\n", "utf-16")
    assert ids(Source(listed="list.txt")) == ["größe.png", "b.png"]
    Path("list.txt").write_text("a\\" + 300 * "b" + "\nb.png\n")
    assert len(ids(Source(listed="list.txt"))) == 2


def test_folders_that_a_pattern_matches_are_looked_into() -> None:
    touched("d/cats/a.png", "d/dogs/b.png", "d/c.png", "d/notes.txt")
    assert ids(Source(["d/*"])) == ["d/c.png", "d/cats/a.png", "d/dogs/b.png", "d/notes.txt"]
    assert ids(Source(["d/**"])) == ["d/c.png", "d/cats/a.png", "d/dogs/b.png"]


def test_pictures_that_the_library_datasets_has_written() -> None:
    pictures_in(Path("p"), 5)
    names = [f"p/{i:04}.png" for i in range(5)]
    made = datasets.Dataset.from_dict({"image": names, "label": [*range(5)]})
    made.cast_column("image", datasets.Image()).to_parquet("made.parquet")
    rows = [*with_pictures(Source(["made.parquet"]).rows())]
    assert [row.id for row in rows] == [f"made.parquet/{i}" for i in range(5)]
    for i, row in enumerate(rows):
        assert open_image(row.place).tobytes() == picture(i).tobytes()  # type: ignore[arg-type]


def test_bytes_paths_and_nothing_in_a_named_column_across_row_groups() -> None:
    Path("q").mkdir()
    picture(7).save("q/seven.png")
    pq.write_table(pa.table({"p": [png(i) for i in range(10)]}), "q/bytes.parquet", row_group_size=6)
    pq.write_table(pa.table({"p": ["seven.png", None, ""]}), "q/paths.parquet")
    source = Source(["q/bytes.parquet", "q/paths.parquet"], column="p")
    rows = [*source.rows()]
    found = [*with_pictures([rows[4], rows[5], rows[8], rows[10], rows[11], rows[12]])]
    assert [row.id for row in found[:3]] == ["q/bytes.parquet/4", "q/bytes.parquet/5", "q/bytes.parquet/8"]
    for row, seed in zip(found, (4, 5, 8, 7), strict=False):
        assert open_image(row.place).tobytes() == picture(seed).tobytes()  # type: ignore[arg-type]
    assert [row.error for row in found[4:]] == ["there is no picture in this row"] * 2
    assert [row.place for row in with_pictures([rows[8], rows[4], rows[2]])] == [png(8), png(4), png(2)]


def test_a_damaged_row_group_spoils_its_own_rows_alone() -> None:
    table = pa.table({"image": [png(i) for i in range(8)]})
    pq.write_table(table, "d.parquet", row_group_size=4, compression="zstd", use_dictionary=False)
    start = pq.read_metadata("d.parquet").row_group(0).column(0).data_page_offset
    raw = bytearray(Path("d.parquet").read_bytes())
    raw[start : start + 20] = b"\xff" * 20
    Path("d.parquet").write_bytes(raw)
    rows = [*with_pictures(Source(["d.parquet"]).rows())]
    assert [bool(row.error) for row in rows] == [True] * 4 + [False] * 4
    assert "damaged" in rows[0].error
    assert [row.place for row in rows[4:]] == [png(i) for i in range(4, 8)]


def test_addresses_are_told_from_paths_in_lists_and_tables() -> None:
    whole = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    Path("list.txt").write_text(f"https://a.org/a.png\n{whole}\n")
    pq.write_table(pa.table({"image": ["https://a.org/a.png", whole]}), "paths.parquet")
    for source in (Source(listed="list.txt"), Source(["paths.parquet"])):
        address, held = opened([*with_pictures(source.rows())], DEFAULT_LIMITS)
        assert "not fetched from the network" in address
        assert held == ((24, 20), picture(3).tobytes())


def test_a_table_of_a_name_that_is_no_text() -> None:
    name = os.fsdecode(b"\xff.parquet")
    pq.write_table(pa.table({"image": [png(2)]}), "a.parquet")
    os.rename("a.parquet", name)
    (row,) = with_pictures(Source([name]).rows())
    assert (row.id, row.place) == (r"\udcff.parquet/0", png(2))


def test_digests_tell_other_names_orders_marks_and_places() -> None:
    rows = [Row("a", "a"), Row("b", "b")]
    others = [rows[::-1], rows[:1], [Row("a", "a"), Row("b", "b", "2")], [Row("ab", "a"), Row("", "b")]]
    assert len({digest_of(one) for one in [rows, *others]}) == 5
    assert digest_of(rows) == digest_of([Row("a", "a"), Row("b", "b")])
    assert digest_of(rows) != digest_of([Row("a", "elsewhere"), Row("b", "b")])
    first, other = (Row("a", Cell("t.parquet", column, 0, 0)) for column in ("image", "mask"))
    assert digest_of([first]) != digest_of([other])
