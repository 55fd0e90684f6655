"""The folder of an extraction: shards that are there whole or not at all, and what they were made with.

part-00000.parquet holds rows 0 to shard_size - 1 of the source, part-00001.parquet the next, and so on: which
rows are done is told by which files there are. Each file keeps a digest of its rows' ids. Names of all other
files begin with _ or ., which readers of Parquet pass over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stepwell.evaluate.differences import differences
from stepwell.extract.columns import schema_of
from stepwell.extract.rows import Row, Shard, digest_of
from stepwell.extract.wanted import What
from stepwell.folders import whole_file, write_whole
from stepwell.version import __version__

__all__ = ["MANIFEST", "OutFolder", "Totals", "Written", "check_out"]

MANIFEST = "_manifest.json"
_KEY = b"stepwell"
"""Of a shard's footer, under which `Written` stands."""
_GROUP = 2**26
"""Bytes that wait until they are written as a row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """About a shard. ids: digest of its rows; bad: rows with an error; run: digest of the settings."""

    rows: int
    bad: int
    ids: str
    run: str


@dataclass(slots=True)
class Totals:
    """Of the shards that are there. new: rows that this run has written."""

    rows: int = 0
    bad: int = 0
    new: int = 0

    def add(self, written: Written, *, is_new: bool) -> None:
        self.rows += written.rows
        self.bad += written.bad
        self.new += written.rows if is_new else 0


def check_out(path: Path) -> None:
    """Raises ValueError for what is no folder of an extraction and cannot become one. Changes nothing."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder for the output")
    if path.is_dir() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        raise ValueError(f"{path} holds other files, and no extraction; name a new or an empty folder")


class OutFolder:
    """One run's folder; small, and the same on every machine that sees it."""

    def __init__(
        self,
        path: Path,
        what: What,
        settings: Mapping[str, Any],
        *,
        shard_size: int,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """settings: what the rows hang on; about: what else the manifest tells; both JSON values. Raises
        ValueError where the folder is not ours, or holds a run with other settings.
        """
        if shard_size < 1:
            raise ValueError(f"a shard is of 1 row or more, got {shard_size}")
        self.path, self.what, self.shard_size = path.absolute(), what, shard_size
        kept = {**settings, "shard_size": shard_size}
        self.run = digest_of([Row(json.dumps(kept, sort_keys=True), None)])
        check_out(path)
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).is_file():
            _refuse_others(path, kept)
            return
        manifest = {"about": {**(about or {}), "stepwell": __version__}, "settings": kept}
        write_whole(path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))

    def remove_drafts(self) -> None:
        """What runs that were killed have left."""
        for draft in self.path.glob(".part-*.parquet"):
            draft.unlink(missing_ok=True)

    def part(self, number: int) -> Path:
        return self.path / f"part-{number:05}.parquet"

    def check(self, rows: Iterator[Row]) -> None:
        """All rows of the source, before anything is written. Raises ValueError where a shard that is there
        holds others, or is of another run.
        """
        there = self._numbers()
        for number in range(max(there, default=-1) + 1):
            part = list(islice(rows, self.shard_size))
            written = self._read(number) if number in there else None
            if written is not None and written.ids != digest_of(part[: written.rows]):
                raise ValueError(
                    f"{self.part(number)} holds other pictures than are there now: they have changed or "
                    "moved since, or fewer are named or asked for; name another folder, or delete this one"
                )

    def missing(self, rows: Iterator[Row], totals: Totals, *, retry_bad: bool = False) -> Iterator[Shard]:
        """Of all rows of the source, the shards that are not there yet; the others are added to the totals.
        retry_bad: those that hold rows with an error are made again.
        """
        there = self._numbers()
        for number in count():
            part = list(islice(rows, self.shard_size))
            if not part:
                return
            written = self._read(number) if number in there else None
            if written is None or written.rows < len(part) or (retry_bad and written.bad):
                yield Shard(number, part)  # fewer: the last of a run that ended there
            else:
                totals.add(written, is_new=False)

    def write(self, shard: Shard, batches: Iterable[tuple[pa.RecordBatch, int]]) -> Written:
        """Takes as many rows from `batches` as the shard has, each batch with how many of them are bad."""
        bad, rows, waiting = 0, 0, []
        schema = schema_of(self.what)
        with (
            whole_file(self.part(shard.number)) as draft,
            draft.open("wb") as file,  # pyarrow takes names in UTF-8 alone
            pq.ParquetWriter(file, schema) as writer,
        ):
            for batch, of_batch in batches:
                waiting.append(batch)
                rows, bad = rows + batch.num_rows, bad + of_batch
                if sum(one.nbytes for one in waiting) > _GROUP:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting))
            if rows != len(shard.rows):
                raise RuntimeError(f"shard {shard.number} got {rows} rows for its {len(shard.rows)}")
            written = Written(rows=rows, bad=bad, ids=digest_of(shard.rows), run=self.run)
            about = {name: getattr(written, name) for name in Written.__slots__}
            writer.add_key_value_metadata({_KEY.decode(): json.dumps(about)})
        return written

    def _numbers(self) -> set[int]:
        """Of the files of shards."""
        return {int(found[1]) for path in self.path.iterdir() if (found := _PART.fullmatch(path.name))}

    def _read(self, number: int) -> Written | None:
        """None for a file that is not whole. Raises ValueError for one of another run."""
        path = self.part(number)
        try:
            with path.open("rb") as file:
                written = Written(**json.loads(pq.read_metadata(file).metadata[_KEY]))
        except (OSError, ValueError, KeyError, TypeError):  # pyarrow has both of the first for damaged files
            return None
        if written.run != self.run:
            raise ValueError(f"{path} is of another run; delete it, or name another folder")
        return written


_PART = re.compile(r"part-(\d{5,})\.parquet")


def _refuse_others(path: Path, settings: Mapping[str, Any]) -> None:
    manifest = path / MANIFEST
    try:
        kept = dict(json.loads(manifest.read_text("utf-8"))["settings"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{manifest} cannot be read; name another folder, or delete this one") from None
    if differing := differences(kept, json.loads(json.dumps(settings))):
        raise ValueError(
            f"{path} holds a run with other settings: {differing}; name another folder, or delete this one"
        )
