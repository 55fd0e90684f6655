"""The same extraction on a cluster, by Ray Data: an actor holds the model and writes whole shards, pictures
are opened by tasks of their own wherever a core is free.

Shards, digests and refusals are those of one machine, and so is going on after a kill: a folder that was
begun here may be finished there. Every machine has to see pictures, output and model by the same paths.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from stepwell.extract.folder import OutFolder, Totals, Written
from stepwell.extract.looking import Looker
from stepwell.extract.opening import Decoded, Lost, opened_in_order, opened_in_time, rows_of_a_task
from stepwell.extract.parquet_rows import with_pictures
from stepwell.extract.rows import Row, Shard
from stepwell.extract.run import SHARD, Progress, Source, open_out
from stepwell.extract.wanted import Wanted
from stepwell.folders import one_line
from stepwell.images.limits import ImageLimits

__all__ = ["extract_on_ray"]

_CORES = 0.5
"""Of an actor and of a task that opens pictures. With whole ones, two actors would leave two cores none that
opens anything, and wait for ever.
"""
_SHARDS = 64
"""Of each actor, between two times that rows are listed and actors begun."""
_REACHED = 10.0
"""Seconds for a cluster to answer at its address."""
_FEWEST = 256
"""Shards at a time, however few actors there are."""


def extract_on_ray(
    load: Callable[[str | None], Any],
    source: Source,
    out: str | Path,
    wanted: Wanted,
    *,
    address: str,
    name: str,
    actors: int | None = None,
    shard_size: int = SHARD,
    limit: int | None = None,
    retry_bad: bool = False,
    progress: Progress | None = None,
) -> Totals:
    """As `stepwell.extract.run.extract`. load: a device, or None for the one asked for -> the model; it is
    sent to other processes. address: "local" for a cluster of this machine alone, "auto" for the one that
    runs here, or ray://HOST:PORT. actors: that hold the model, by default one a GPU, or one for two cores.

    The model is loaded here once too, on the CPU, to tell what it is. Raises ValueError as `extract` does,
    and for an address where no cluster is.
    """
    _check(address)
    looker = Looker(load("cpu"), wanted, name=name)
    with (
        open_out(Path(out), looker, shard_size=shard_size, name=name, source=source, limit=limit) as folder,
        _connected(address),
    ):
        del looker
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = min(actors or gpus or max(1, cores // 2), max(1, int(cores / _CORES) - 1))
        totals = Totals()
        shards = folder.missing(islice(source.rows(), limit), totals, retry_bad=retry_bad)
        while waiting := list(islice(shards, max(_FEWEST, _SHARDS * count))):
            options = {"num_cpus": _CORES, **({"num_gpus": 1} if gpus else {})}
            for written in _written(waiting, (load, folder, wanted, name), count, options):
                totals.add(written, is_new=True)
                if progress is not None:
                    progress(totals.rows, totals.new)
        return totals


def _check(address: str) -> None:
    """Raises ValueError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("local", "auto"):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no cluster of Ray at {address} ({one_line(error)}); use local, auto or ray://HOST:PORT"
        ) from None


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Raises ValueError where no cluster is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to the network
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray raises bare ones, such as where its processes do not start in time
        raise ValueError(f"no cluster of Ray at {address}: {one_line(error)}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _written(
    shards: Sequence[Shard], arguments: tuple[Any, ...], actors: int, options: Mapping[str, Any]
) -> Iterator[Written]:
    """As they are written, in any order."""
    items = [{"shard": pickle.dumps(shard)} for shard in shards]
    found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Writer,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
        **options,
    )
    for row in found.iter_rows():
        yield pickle.loads(row["written"])


class _Writer:
    """An actor: the model, and shards one after the other."""

    def __init__(
        self, load: Callable[[str | None], Any], folder: OutFolder, wanted: Wanted, name: str
    ) -> None:
        self.folder = folder
        self.looker = Looker(load(None), wanted, name=name)
        self.openers = _Tasks(wanted.limits)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of pickled shards -> what is said of each when it is written."""
        written = [self._write(pickle.loads(shard)) for shard in batch["shard"]]
        return {"written": np.array([pickle.dumps(one) for one in written], dtype=object)}

    def _write(self, shard: Shard) -> Written:
        pictures = opened_in_order(with_pictures(shard.rows), self.openers)
        return self.folder.write(shard, self.looker.batches(pictures))


class _Tasks:
    """Tasks of Ray that open pictures (stepwell.extract.opening.Openers)."""

    ahead = 4

    def __init__(self, limits: ImageLimits) -> None:
        self.limits, self.piece = limits, rows_of_a_task(limits, most=16)
        self._open = ray.remote(num_cpus=_CORES, max_retries=0)(opened_in_time)

    def submit(self, rows: Sequence[Row]) -> Any:
        return self._open.remote(list(rows), self.limits)

    def result(self, task: Any) -> list[Decoded]:
        try:
            found: list[Decoded] = ray.get(task)
            return found
        except RayTaskError:
            raise
        except RayError:
            raise Lost("the process that opened it is gone: it took too long, or memory is short") from None
