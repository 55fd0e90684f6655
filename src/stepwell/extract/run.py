"""Pictures through a model into a folder of Parquet shards; killed and run again, it goes on where it was.

from stepwell.extract.run import Source, Wanted, extract

if __name__ == "__main__":  # pictures are opened by processes that import this script
    totals = extract(stepwell.load("my_detector"), Source(["pictures"]), "out", Wanted(what="predict"))
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from stepwell.extract.folder import OutFolder, Totals, check_out
from stepwell.extract.looking import Looker
from stepwell.extract.opening import Here, Openers, Processes, opened_in_order
from stepwell.extract.parquet_rows import with_pictures
from stepwell.extract.rows import Row, Shard
from stepwell.extract.sources import Source
from stepwell.extract.wanted import Wanted
from stepwell.folders import locked

__all__ = ["SHARD", "Progress", "Source", "Totals", "Wanted", "extract", "open_out"]

SHARD = 256
"""Rows of a shard, where nobody says how many: what a kill costs at most."""
_MOST_PROCESSES = 8

Progress = Callable[[int, int], object]
"""Called with the rows that are there, and how many of them are new."""


def extract(
    model: Any,
    source: Source,
    out: str | Path,
    wanted: Wanted,
    *,
    name: str = "the model",
    shard_size: int = SHARD,
    limit: int | None = None,
    processes: int | None = None,
    retry_bad: bool = False,
    progress: Progress | None = None,
) -> Totals:
    """model: of `stepwell.load`. limit: of rows, from the first. processes: that open pictures, 0 for none
    beside this one; by default one less than there are cores, 8 at most. retry_bad: shards with errors are
    made again. name: of the model, in refusals and in the manifest.

    A picture that cannot be opened or looked at is a row with its error. Raises ValueError for a model that
    does not give what is wanted, for a folder that is not ours, holds a run with other settings or of other
    pictures, or is worked on by another run, and where no process can be started.
    """
    looker = Looker(model, wanted, name=name)
    check_out(Path(out))
    count = min(_MOST_PROCESSES, max(1, (os.cpu_count() or 1) - 1)) if processes is None else processes
    with ExitStack() as stack:
        openers: Openers = Here(wanted.limits)
        if count:  # before the folder is touched: a script that is imported by them once more ends here
            openers = stack.enter_context(Processes(count, wanted.limits))
        opening = open_out(Path(out), looker, shard_size=shard_size, name=name, source=source, limit=limit)
        folder = stack.enter_context(opening)
        totals = Totals()
        shards = folder.missing(islice(source.rows(), limit), totals, retry_bad=retry_bad)
        _extract(looker, folder, shards, totals, openers, progress)
    return totals


@contextmanager
def open_out(
    path: Path, looker: Looker, *, shard_size: int, name: str, source: Source, limit: int | None
) -> Iterator[OutFolder]:
    """The folder of a run, which no other works on meanwhile, without what killed ones have left, and with
    shards of the same rows alone. Raises ValueError as `OutFolder` does, and its `check`.
    """
    named = [*source.names, *([str(source.listed)] if source.listed else [])]
    about = {"model": name, "pictures": named[:100]}
    folder = OutFolder(path, looker.wanted.what, looker.settings(), shard_size=shard_size, about=about)
    with locked(folder.path):
        folder.check(islice(source.rows(), limit))
        folder.remove_drafts()
        yield folder


def _extract(
    looker: Looker,
    folder: OutFolder,
    shards: Iterator[Shard],
    totals: Totals,
    openers: Openers,
    progress: Progress | None,
) -> None:
    """Makes the shards, and adds them to the totals."""
    begun: deque[Shard] = deque()

    def rows() -> Iterator[Row]:
        """Of all shards, so that pictures are opened ahead of the shard that is written."""
        for shard in shards:
            begun.append(shard)
            yield from shard.rows

    def told(batches: Iterator[tuple[pa.RecordBatch, int]]) -> Iterator[tuple[pa.RecordBatch, int]]:
        count = 0
        for batch, bad in batches:
            count += batch.num_rows
            yield batch, bad
            if progress is not None:
                progress(totals.rows + count, totals.new + count)

    pictures = opened_in_order(with_pictures(rows()), openers)
    for first in pictures:
        shard = begun.popleft()
        of_shard = chain([first], islice(pictures, len(shard.rows) - 1))
        totals.add(folder.write(shard, told(looker.batches(of_shard))), is_new=True)
