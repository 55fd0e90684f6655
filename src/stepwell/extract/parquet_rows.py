"""Pictures in a column of a Parquet file: bytes, paths, or {bytes, path} as the library datasets writes them.

Rows are told by the file's footer alone. Pictures are read in their order, a few at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stepwell.extract.rows import Cell, Row, named_place, plain_text
from stepwell.folders import one_line

__all__ = ["count_parquet_rows", "parquet_rows", "with_pictures"]

_TOGETHER = 4
"""Rows that are read at a time."""
_BUFFER = 2**20
"""Bytes of a file: without one, pyarrow would read a whole row group's column at once."""


def parquet_rows(path: str, column: str) -> Iterator[Row]:
    """A row for each of the file's; ids are PATH/NUMBER, from 0. Raises ValueError for a file that is no
    Parquet, and for one without such a column of pictures; OSError for no such file.
    """
    where = os.path.abspath(path)
    with closing(_opened(path, column)) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    mark, number = str(os.path.getsize(where)), 0
    for group, count in enumerate(groups):
        for row in range(count):
            yield Row(plain_text(f"{path}/{number}"), Cell(where, column, group, row), mark)
            number += 1


def count_parquet_rows(path: str, column: str) -> int:
    """Raises as `parquet_rows` does."""
    with closing(_opened(path, column)) as file:
        return int(file.metadata.num_rows)


def with_pictures(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows whose places are cells -> the same with what the cells hold; others as they are."""
    cells: _Cells | None = None
    for row in rows:
        if isinstance(row.place, Cell):
            if cells is None or not cells.leads_to(row.place):
                cells = _Cells(row.place)
            row = cells.filled(row, row.place)
        yield row


def _opened(path: str, column: str) -> pq.ParquetFile:
    try:
        opened = pa.OSFile(os.fsencode(path))  # a text would have to be UTF-8
        file = pq.ParquetFile(opened, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None):  # pyarrow's own, for a damaged file, have no number
            raise
        raise ValueError(f"{path} is no Parquet file: {one_line(error)}") from None
    fields = file.schema_arrow
    if column not in fields.names:
        file.close()
        raise ValueError(
            f"{path} has no column {column!r} of pictures, but {', '.join(fields.names)}: name one with "
            "--column"
        )
    if fields.names.count(column) > 1:
        file.close()
        raise ValueError(f"{path} has several columns {column!r}")
    kind = fields.field(column).type
    if not (_is_bytes_or_text(kind) or (pa.types.is_struct(kind) and _names(kind) & {"bytes", "path"})):
        file.close()
        raise ValueError(f"{path}: pictures are bytes, paths or {{bytes, path}}, and {column!r} holds {kind}")
    return file


def _is_bytes_or_text(kind: pa.DataType) -> bool:
    tests = ("binary", "large_binary", "string", "large_string")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _names(kind: Any) -> set[str]:
    return {kind.field(i).name for i in range(kind.num_fields)}


class _Cells:
    """A column of one row group, read forwards."""

    def __init__(self, first: Cell) -> None:
        self.first, self.next = first, 0
        self.error = ""
        self._values = self._read()

    def leads_to(self, cell: Cell) -> bool:
        return cell[:3] == self.first[:3] and cell.row >= self.next

    def filled(self, row: Row, cell: Cell) -> Row:
        """With the bytes, or the path, that a cell holds."""
        value = None
        try:
            while not self.error and self.next <= cell.row:
                value = next(self._values)
                self.next += 1
        except (ValueError, OSError, StopIteration) as error:
            self.error = f"the Parquet file is damaged, or has changed ({one_line(error)})"
        if self.error:
            return row._replace(place=None, error=self.error)
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        found = path if content is None else content
        if not found:
            return row._replace(place=None, error="there is no picture in this row")
        if isinstance(found, str):
            found = named_place(os.path.dirname(cell.path), found)
        return row._replace(place=found)

    def _read(self) -> Iterator[Any]:
        with closing(_opened(self.first.path, self.first.column)) as file:
            for batch in file.iter_batches(
                batch_size=_TOGETHER, row_groups=[self.first.group], columns=[self.first.column]
            ):
                yield from batch.column(0).to_pylist()
