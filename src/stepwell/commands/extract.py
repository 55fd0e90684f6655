"""`stepwell extract`: features, visual tokens, predictions or answers of any number of pictures, as Parquet.

Nothing imported above imports torch: what needs no model is answered before it is there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stepwell.commands.graph_options import Int8, OnRuntime, Runtime, check_runtime, load_on_runtime
from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import Device, Dtype, MaxNewTokens, Precision, Revision, check_model, quieten
from stepwell.commands.printing import show_pace
from stepwell.commands.tile_options import InTiles, TileOverlap, TileScale, TileSize, tiles_of
from stepwell.extract.wanted import Wanted
from stepwell.folders import SHIPPED, SHIPPED_DETECTOR

__all__ = ["extract"]

BAD = 1
"""Exit code where a picture could not be opened or looked at."""


def extract(
    pictures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PICTURES",
            help="Files, folders, quoted patterns, WebDataset's .tar, .parquet.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A folder of Parquet files, of this run alone.")
    ] = None,
    what: Annotated[
        Literal["features", "tokens", "predict", "ask"] | None,
        typer.Option(help="Feature maps, visual tokens, predictions, or answers to --question."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model folder, a hub name or a published name. "
            f"[default: {SHIPPED_DETECTOR.name} for predict, {SHIPPED.name} for others]",
        ),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", metavar="FILE", dir_okay=False, help="A picture's path a line."),
    ] = None,
    column: Annotated[str, typer.Option(help="Of pictures, in Parquet files.")] = "image",
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="For --what ask.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="As of predict.")] = None,
    max_detections: Annotated[int | None, typer.Option(min=1, help="As of predict.")] = None,
    tiles: InTiles = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    tile_scale: TileScale = None,
    store: Annotated[
        Literal["float32", "float16"], typer.Option(help="The numbers of feature maps and tokens.")
    ] = "float32",
    shard_size: Annotated[
        int, typer.Option(min=1, help="Pictures in a file; what a kill costs at most.")
    ] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Pictures, from the first. [default: all]")] = None,
    retry_bad: Annotated[
        bool,
        typer.Option("--retry-bad", help="Make files with errors in them again."),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option("--batch", "--batch-size", min=1, help="Together. [default: 1 on a CPU, 8 elsewhere]"),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=0, help="That open pictures beside the model; 0 for none. [default: cores - 1, 8 at most]"
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run by Ray Data: local, auto for the cluster that runs here, or ray://HOST:PORT.",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="That hold the model, with --ray. [default: one a GPU, or for two cores]"),
    ] = None,
    runtime: OnRuntime = None,
    int8: Int8 = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Look at any number of pictures and keep what a model gives; run again, it goes on where it stopped."""
    if out is None and listed is not None and pictures:
        *pictures, last = pictures
        out = Path(last)
    if out is None or what is None or not (pictures or listed):
        raise ValueError("name pictures, a folder and what: stepwell extract PICTURES... OUT --what features")
    if actors is not None and ray is None:
        raise ValueError("--actors are of --ray; leave it out")
    if processes is not None and ray is not None:
        raise ValueError("--processes are of one machine; with --ray, its tasks open pictures")
    check_runtime(runtime, device, dtype, int8=int8)
    name = model or (SHIPPED_DETECTOR if what == "predict" else SHIPPED).name
    wanted = Wanted(
        what=what,
        question=question,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        max_detections=max_detections,
        tiles=tiles_of(tiles, size=tile_size, overlap=tile_overlap, scale=tile_scale),
        store=store,
        batch=batch,
        limits=image_limits(
            for_tiles=tiles,
            max_pixels=max_pixels,
            max_side=max_side,
            max_aspect=max_aspect,
            max_bytes=max_bytes,
            max_seconds=max_seconds,
        ),
    )
    check_model(name, device)
    try:
        from stepwell.extract.folder import check_out
        from stepwell.extract.sources import Source

        check_out(out)
        source = Source(pictures or [], listed=listed, column=column)
        from stepwell.extract.run import extract as run
    except ModuleNotFoundError as error:
        raise _lacking(error) from None
    options: dict[str, Any] = {
        "name": name,
        "shard_size": shard_size,
        "limit": limit,
        "retry_bad": retry_bad,
        "progress": _pace(source, limit) if sys.stderr.isatty() else None,
    }
    place = os.path.abspath(name) if os.path.isdir(name) else name  # processes of Ray begin elsewhere
    load = partial(_load, place, revision, dtype, device, runtime, int8=int8)
    if ray is None:
        network = load(None)
        totals = run(network, source, out, wanted, processes=processes, **options)
    else:
        try:
            from stepwell.extract.on_ray import extract_on_ray
        except ModuleNotFoundError as error:
            raise _lacking(error) from None
        totals = extract_on_ray(load, source, out, wanted, address=ray, actors=actors, **options)
    if options["progress"] is not None:
        print(file=sys.stderr)  # ends the line of the progress
    before = totals.rows - totals.new
    print(f"{totals.rows} pictures in {out}{f', {before} of them from before' if before else ''}", flush=True)
    if totals.bad:
        print(
            f"stepwell: {totals.bad} of {totals.rows} pictures could not be looked at; their error says why",
            file=sys.stderr,
        )
        raise typer.Exit(BAD)


def _pace(source: Any, limit: int | None) -> Callable[[int, int], None]:
    """What shows how far it is."""
    total = source.count()
    if limit is not None:
        total = limit if total is None else min(total, limit)
    began = time.monotonic()
    return lambda count, new: show_pace(count, total, new=new, seconds=time.monotonic() - began)


def _load(
    name: str,
    revision: str | None,
    dtype: Precision | None,
    device: str | None,
    runtime: Runtime | None,
    forced: str | None,
    *,
    int8: bool,
) -> Any:
    """forced: the device, in place of the one asked for. Processes of Ray call it too."""
    quieten()
    if runtime is not None:
        return load_on_runtime(name, runtime, revision, int8=int8)
    from stepwell.weights.light import load_to_ask

    return load_to_ask(name, device=forced or device, dtype=dtype, revision=revision)


def _lacking(error: ModuleNotFoundError) -> ImportError:
    """The error to raise where a package of the extra is not installed; others are faults."""
    package = (error.name or "").partition(".")[0]
    if package not in ("pyarrow", "pebble", "ray"):
        return error
    return ImportError(f"extract needs {package}: pip install 'stepwell[scale]'")
